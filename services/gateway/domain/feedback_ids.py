"""Ids of answers. Pure.

An id contains the facts about its answer, so the gateway does not store these facts. An id is ``fb1.``,
followed by text in base64. This text encodes a JSON list and then the first bytes of the list's HMAC-SHA256.
The HMAC's key is derived from the service token. So a gateway accepts only ids that a gateway with the same
service token made.
"""

from __future__ import annotations

import hashlib
import hmac
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import astuple, dataclass
from typing import Any

import orjson

PREFIX = "fb1."
# Longer texts cannot be ids, so they are refused without decoding.
LONGEST = 2048
_MAC_BYTES = 10


@dataclass(frozen=True, slots=True)
class AnswerFacts:
    """The facts about an answer that its id contains. ``at``: microseconds since the epoch.

    ``assigned``: True if weights or a sticky key chose the Deployment. It is False if a routing rule chose
    the Deployment, if the request named the version, or if the request was moved to another Deployment.
    ``unit``: the hash of the sticky key, or empty. ``owner``: the hash of the caller. ``experiment``: the id
    of the experiment that chose the Deployment, or empty.
    """

    endpoint: str
    deployment: str
    version: str
    request_id: str
    at: int
    assigned: bool
    unit: str
    owner: str
    experiment: str = ""


class FeedbackIds:
    """Make and read the ids of answers."""

    def __init__(self, service_token: str) -> None:
        self._key = hmac.digest(service_token.encode(), b"tidegate feedback", "sha256")

    def make(self, facts: AnswerFacts) -> bytes:
        """Return the id of an answer, in ASCII."""
        content = orjson.dumps(astuple(facts))
        return PREFIX.encode() + urlsafe_b64encode(content + self._mac(content)).rstrip(b"=")

    def read(self, id_: str) -> AnswerFacts | None:
        """Return the facts in an id; None if no gateway with this service token made the id."""
        if not id_.startswith(PREFIX) or len(id_) > LONGEST:
            return None
        text = id_[len(PREFIX) :]
        try:
            raw = urlsafe_b64decode(text + "=" * (-len(text) % 4))
        except ValueError:
            return None
        content, mac = raw[:-_MAC_BYTES], raw[-_MAC_BYTES:]
        if not hmac.compare_digest(mac, self._mac(content)):
            return None
        members: list[Any] = orjson.loads(content)
        return AnswerFacts(*members)

    def owner(self, principal: str) -> str:
        """Return the hash of a caller's name. Ids contain this hash instead of the name."""
        return self._hash(b"owner", principal.encode())

    def unit(self, key: bytes) -> str:
        """Return the hash of a sticky key."""
        return self._hash(b"unit", key)

    def _mac(self, content: bytes) -> bytes:
        return hmac.digest(self._key, content, "sha256")[:_MAC_BYTES]

    def _hash(self, kind: bytes, value: bytes) -> str:
        return hashlib.blake2b(value, digest_size=8, key=self._key, person=kind).hexdigest()
