"""Preconditions of a change: the headers ``If-Match`` and ``If-None-Match``. Pure."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from tidegate.kernel.errors import BadRequest, PreconditionFailed
from tidegate.kernel.protocol.models import Version

Kind = Literal["deployment", "endpoint", "version", "card", "baseline", "alias", "policy", "key"]
ANY = "*"
_ETAG = re.compile(r'(?:W/)?"?([!#-~]{1,80}?)"?')


@dataclass(frozen=True, slots=True)
class Precondition:
    """The state that an object must have before a change. ``match``: the allowed ETags of the object.

    ``ANY`` in ``match``: the object must exist. ``match`` None: the ETag is not checked. ``new``: True if the
    object must not exist.
    """

    kind: Kind
    name: str
    match: frozenset[str] | None = None
    new: bool = False

    def check(self, etag: str | None) -> None:
        """Raise PreconditionFailed if the object is not in the required state.

        ``etag``: the object's ETag; None if the object does not exist.
        """
        what = f"{self.kind.capitalize()} {self.name!r}"
        if self.new and etag is not None:
            raise PreconditionFailed(
                f"{what} already exists, and If-None-Match: * allows only a new object. To replace the "
                "object, PUT without this header."
            )
        if self.match is None or (etag is not None and self.match & {etag, ANY}):
            return
        now = "does not exist" if etag is None else f"has the ETag {etag}"
        expected = ", ".join(sorted(self.match))
        raise PreconditionFailed(
            f"{what} {now}, not {expected}. Read the object again and repeat the change."
        )


def precondition(kind: Kind, name: str, match: str | None, none_match: str | None) -> Precondition | None:
    """Return the precondition in the headers ``If-Match`` and ``If-None-Match``; None without them.

    Raise BadRequest for a header that cannot be read.
    """
    if none_match is not None and none_match.strip() != ANY:
        raise BadRequest(
            "For a change, If-None-Match must be *. It means that the object must not exist yet."
        )
    if match is None:
        return Precondition(kind, name, new=True) if none_match is not None else None
    etags = [_ETAG.fullmatch(each.strip()) for each in match.split(",")]
    if not all(etags):
        raise BadRequest(
            f"If-Match must have the ETag that GET returned, or *, not {match[:40]!r}. Separate several "
            "ETags by commas."
        )
    return Precondition(kind, name, frozenset(each[1] for each in etags if each), none_match is not None)


def version_etag(version: Version) -> str:
    """Return the ETag of a version: a digest of its parts that can change, metadata and signature."""
    return content_etag(version.model_dump(mode="json", include={"metadata", "signature"}))


def content_etag(content: Any) -> str:
    """Return the ETag of an object without a revision: a digest of ``content``, which is a JSON value."""
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()[:32]
