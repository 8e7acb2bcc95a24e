"""Error answers in Tidegate's format, as JSON or as a complete HTTP answer in bytes."""

from __future__ import annotations

import os
from http import HTTPStatus
from typing import NamedTuple

import orjson

# One system call makes the ids of many requests. One system call for each id would take 6 % of a gateway's
# CPU time.
_IDS_AT_ONCE = 256
_unused_ids: list[str] = []
os.register_at_fork(after_in_child=_unused_ids.clear)  # a forked process must not use the same ids


class Refusal(NamedTuple):
    """An error that closes a connection: status, reason (for programs) and message (for people)."""

    status: int
    reason: str
    message: str


def error_body(message: str, reason: str, rid: str) -> dict[str, str]:
    """Return the JSON body of an error answer. Clients of the Open Inference Protocol read only ``error``."""
    return {"error": message, "reason": reason, "request_id": rid}


def new_request_id() -> str:
    """Return a random id, 16 hex digits."""
    try:
        return _unused_ids.pop()
    except IndexError:
        _unused_ids.extend(os.urandom(8 * _IDS_AT_ONCE).hex(" ", 8).split())
        return _unused_ids.pop()


def raw(refusal: Refusal, rid: str) -> bytes:
    """Return the whole HTTP/1.1 answer for a refusal, with ``connection: close``."""
    body = orjson.dumps(error_body(refusal.message, refusal.reason, rid))
    status = HTTPStatus(refusal.status)
    return (
        b"HTTP/1.1 %d %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
        b"x-request-id: %b\r\nconnection: close\r\n\r\n%b"
        % (status, status.phrase.encode(), len(body), rid.encode("latin-1"), body)
    )
