"""What a caller may ask of a job, read from headers or from a body: pure."""

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
# Fields of POST /v1/jobs that are the gateway's; all others are those of an inference request.
OWN_FIELDS = ("model", "version", "priority", "ttl_s", "webhook", "metadata")


@dataclass(frozen=True, slots=True)
class Preference:
    """What ``Prefer`` asks: a job, and how long (seconds) its caller waits for the result before the 202."""

    wait_s: float = 0.0

    @property
    def applied(self) -> bytes:
        """The value of ``Preference-Applied``."""
        return b"wait=%d" % self.wait_s if self.wait_s else b"respond-async"


@dataclass(frozen=True, slots=True)
class JobOptions:
    """What a job has beside its request. ``ttl_s`` None: the default; after it the job expires."""

    level: Level = "normal"
    ttl_s: float | None = None
    webhook: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


_DEFAULT = JobOptions()


def preference(header: bytes | None) -> Preference | None:
    """The preference for a job in a ``Prefer`` header (RFC 7240); None when there is none in it."""
    if header is None:
        return None
    asked, wait_s = False, 0.0
    for part in re.split(rb"[,;]", header.lower()):
        word = part.strip()
        if found := _WAIT.fullmatch(word):
            asked, wait_s = True, min(float(found[1]), MAX_WAIT_S)
        elif word == b"respond-async":
            asked = True
    return Preference(wait_s) if asked else None


def from_headers(headers: Mapping[bytes, bytes]) -> JobOptions:
    """The options in ``X-Job-Priority``, ``X-Job-TTL`` (seconds) and ``X-Job-Webhook``; raises BadRequest."""
    found = {
        name: value.decode("latin-1")
        for name, header in (
            ("priority", b"x-job-priority"),
            ("ttl_s", b"x-job-ttl"),
            ("webhook", b"x-job-webhook"),
        )
        if (value := headers.get(header)) is not None
    }
    if not found:
        return _DEFAULT
    given: dict[str, Any] = dict(found)
    if "ttl_s" in found:
        try:
            given["ttl_s"] = float(found["ttl_s"])
        except ValueError:
            raise BadRequest(f"X-Job-TTL must be a number of seconds, got {found['ttl_s'][:40]!r}") from None
    return from_fields(given)


def from_fields(head: Mapping[str, Any], base: JobOptions = _DEFAULT) -> JobOptions:
    """The options among a body's fields, over those of ``base``; raises BadRequest."""
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


def check_version(found: Any) -> str:
    """A version as the routes name it; empty: none is named. Raises BadRequest."""
    if isinstance(found, bool) or not isinstance(found, str | int | None):
        raise BadRequest(f"'version' must be a number, got {str(found)[:40]!r}")
    return "" if found is None else str(found)


def check_level(found: Any) -> Level:
    """A priority level; raises BadRequest."""
    if found not in LEVELS:
        raise BadRequest(f"priority must be one of {', '.join(LEVELS)}, got {str(found)[:40]!r}")
    level: Level = found
    return level


def check_ttl(found: Any) -> float:
    """How many seconds a job may take from its acceptance to its end; raises BadRequest."""
    if isinstance(found, bool) or not isinstance(found, int | float) or not 1 <= found <= MAX_TTL_S:
        raise BadRequest(f"the ttl must be 1..{MAX_TTL_S} seconds, got {str(found)[:40]!r}")
    return float(found)


def check_webhook(found: Any) -> str:
    """A webhook's URL; raises BadRequest. Whether its address may be reached is judged on delivery."""
    if not isinstance(found, str) or read_url(found) is None:
        raise BadRequest(f"webhook must be a plain http or https URL without a user, got {str(found)[:80]!r}")
    return found


def check_metadata(found: Any) -> dict[str, Any]:
    """The caller's own facts, given back with the job; raises BadRequest."""
    if not isinstance(found, dict):
        raise BadRequest(f"metadata must be an object, got {type(found).__name__}")
    if (size := len(orjson.dumps(found))) > MAX_METADATA_BYTES:
        raise BadRequest(f"metadata has {size} bytes, at most {MAX_METADATA_BYTES} are kept")
    return found


def check_key(found: bytes | None) -> str | None:
    """An ``Idempotency-Key``; raises BadRequest."""
    if found is None:
        return None
    if _KEY.fullmatch(found) is None:
        raise BadRequest(f"Idempotency-Key must be 1..{MAX_KEY} printable ASCII characters without spaces")
    return found.decode("ascii")
