"""Options of a job, read from headers or from a body. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.jobs import LEVELS, Level
from tidegate.kernel.protocol.webhooks import read_url

MAX_WAIT_S = 600.0
MAX_TTL_S = 30 * 86_400
MAX_METADATA_BYTES = 4096
MAX_KEY = 255
_WAIT = re.compile(rb"wait\s*=\s*\"?(\d{1,9})\"?")
_KEY = re.compile(rb"[\x21-\x7e]{1,255}")


@dataclass(frozen=True, slots=True)
class Preference:
    """A caller's preference that its request runs as a job, from the header ``Prefer``.

    ``wait_s``: the seconds to wait for the result before the gateway answers 202.
    """

    wait_s: float = 0.0

    @property
    def applied(self) -> bytes:
        """Return the value of the response header ``Preference-Applied``."""
        return b"wait=%d" % self.wait_s if self.wait_s else b"respond-async"


@dataclass(frozen=True, slots=True)
class JobOptions:
    """The options of a job.

    ``ttl_s``: the job expires after this many seconds. None means the default number of seconds.
    """

    level: Level = "normal"
    ttl_s: float | None = None
    webhook: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


_DEFAULT = JobOptions()
# Almost all jobs have exactly this header value. A direct comparison saves the parsing of the header.
_USUAL, _ASYNC = b"respond-async", Preference()


def preference(header: bytes | None) -> Preference | None:
    """Return the preference in a ``Prefer`` header (RFC 7240); None if the header does not request a job."""
    if header is None:
        return None
    if header == _USUAL:
        return _ASYNC
    present, wait_s = False, 0.0
    for part in re.split(rb"[,;]", header.lower()):
        word = part.strip()
        if match := _WAIT.fullmatch(word):
            present, wait_s = True, min(float(match[1]), MAX_WAIT_S)
        elif word == b"respond-async":
            present = True
    return Preference(wait_s) if present else None


def from_headers(headers: Mapping[bytes, bytes], base: JobOptions = _DEFAULT) -> JobOptions:
    """Return ``base``, changed by the job headers of a request.

    The headers are ``X-Job-Priority``, ``X-Job-TTL`` (seconds) and ``X-Job-Webhook``. Raise BadRequest if a
    header has an invalid value.
    """
    texts = {
        name: value.decode("latin-1")
        for name, header in (
            ("priority", b"x-job-priority"),
            ("ttl_s", b"x-job-ttl"),
            ("webhook", b"x-job-webhook"),
        )
        if (value := headers.get(header)) is not None
    }
    if not texts:
        return base
    fields: dict[str, Any] = dict(texts)
    if "ttl_s" in texts:
        try:
            fields["ttl_s"] = float(texts["ttl_s"])
        except ValueError:
            raise BadRequest(f"X-Job-TTL must be a number of seconds, got {texts['ttl_s'][:40]!r}") from None
    return from_fields(fields, base)


def from_fields(head: Mapping[str, Any], base: JobOptions = _DEFAULT) -> JobOptions:
    """Return ``base`` with the options that a body's fields set; raise BadRequest if one is invalid."""
    changes: dict[str, Any] = {}
    if (level := head.get("priority")) is not None:
        changes["level"] = check_level(level)
    if (ttl_s := head.get("ttl_s")) is not None:
        changes["ttl_s"] = check_ttl(ttl_s)
    if (webhook := head.get("webhook")) is not None:
        changes["webhook"] = check_webhook(webhook)
    if (metadata := head.get("metadata")) is not None:
        changes["metadata"] = check_metadata(metadata)
    return replace(base, **changes) if changes else base


def check_version(value: Any) -> str:
    """Return a version as a string, as in the route table; empty for None.

    ``value``: a string, an integer or None. Raise BadRequest for another type.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | None):
        raise BadRequest(f"'version' must be a number, got {str(value)[:40]!r}")
    return "" if value is None else str(value)


def check_level(value: Any) -> Level:
    """Check a priority level and return it; raise BadRequest if it is unknown."""
    if value not in LEVELS:
        raise BadRequest(f"priority must be one of {', '.join(LEVELS)}, got {str(value)[:40]!r}")
    level: Level = value
    return level


def check_ttl(value: Any) -> float:
    """Check a job's ttl and return it; raise BadRequest if it is invalid.

    The ttl is the time in seconds from the job's acceptance until it expires.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value <= MAX_TTL_S:
        raise BadRequest(f"the ttl must be 1..{MAX_TTL_S} seconds, got {str(value)[:40]!r}")
    return float(value)


def check_webhook(value: Any) -> str:
    """Check a webhook's URL and return it; raise BadRequest if it is invalid.

    The IP address is checked later, when the job's result is sent to the URL.
    """
    if not isinstance(value, str) or read_url(value) is None:
        raise BadRequest(f"webhook must be an http or https URL without a user name, got {str(value)[:80]!r}")
    return value


def check_metadata(value: Any) -> dict[str, Any]:
    """Check a job's metadata from the caller and return it; raise BadRequest if it is invalid."""
    if not isinstance(value, dict):
        raise BadRequest(f"metadata must be an object, got {type(value).__name__}")
    if (size := len(orjson.dumps(value))) > MAX_METADATA_BYTES:
        raise BadRequest(f"metadata has {size} bytes, but the limit is {MAX_METADATA_BYTES}")
    return value


def check_key(value: bytes | None) -> str | None:
    """Return the value of an ``Idempotency-Key`` header; None if the header is missing.

    Raise BadRequest if the value is invalid.
    """
    if value is None:
        return None
    if _KEY.fullmatch(value) is None:
        raise BadRequest(f"Idempotency-Key must be 1..{MAX_KEY} printable ASCII characters without spaces")
    return value.decode("ascii")
