"""A file in OpenAI's API: uploaded by a caller, or written by a batch. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tidegate.kernel.errors import BadRequest, NotFound
from tidegate.kernel.protocol.jobs import read_id

PREFIX = "file-"
Purpose = Literal["batch", "batch_output"]
# OpenAI's limits for ``expires_after``, in seconds.
LEAST_KEPT_S, MOST_KEPT_S = 3600, 30 * 86_400
MAX_FILENAME = 255


@dataclass(frozen=True, slots=True)
class StoredFile:
    """The record of a file. Times are milliseconds since the epoch.

    ``lines`` counts the lines that are not blank. ``size`` is in bytes.
    """

    id: bytes
    principal: str
    filename: str
    purpose: Purpose
    size: int
    lines: int
    created_ms: int
    expires_ms: int

    def public(self) -> dict[str, Any]:
        """Return the file as the API shows it."""
        return {
            "id": file_name(self.id),
            "object": "file",
            "bytes": self.size,
            "created_at": self.created_ms // 1000,
            "expires_at": self.expires_ms // 1000,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


def file_name(id_: bytes) -> str:
    """Return a file's id as OpenAI's API shows it."""
    return PREFIX + id_.hex()


def read_file_id(text: str) -> bytes:
    """Convert a file's id in OpenAI's API to its internal id.

    Raise NotFound if ``text`` does not have the form of a file's id.
    """
    id_ = read_id(text.removeprefix(PREFIX)) if text.startswith(PREFIX) else None
    if id_ is None:
        raise no_file(text)
    return id_


def no_file(text: str) -> NotFound:
    """Return the error for a file that does not exist."""
    return NotFound(f"there is no file {text[:64]!r}: GET /v1/files lists your files", reason="no_such_file")


def check_purpose(value: str | None) -> Purpose:
    """Return the purpose of an uploaded file. Raise BadRequest if it is not ``batch``."""
    if value != "batch":
        raise BadRequest(f"the form's field 'purpose' must be 'batch', got {(value or '')[:40]!r}")
    return "batch"


def check_filename(value: str | None) -> str:
    """Return the name of an uploaded file, without its folders and without unprintable characters."""
    name = (value or "").replace("\\", "/").rpartition("/")[2]
    return "".join(each for each in name if each.isprintable())[:MAX_FILENAME] or "file.jsonl"


def kept_s(anchor: str | None, seconds: str | None, default_s: float) -> float:
    """Return how many seconds to keep a file.

    ``anchor``, ``seconds``: the form's fields ``expires_after[anchor]`` and ``expires_after[seconds]``. If
    both are missing, the result is ``default_s``. Otherwise, raise BadRequest if ``anchor`` is wrong, or if
    ``seconds`` is missing or wrong.
    """
    if anchor is None and seconds is None:
        return default_s
    if anchor not in (None, "created_at"):
        raise BadRequest(f"expires_after[anchor] must be 'created_at', got {anchor[:40]!r}")
    usable = seconds is not None and seconds.isdecimal() and len(seconds) <= 12
    if seconds is None or not usable or not LEAST_KEPT_S <= int(seconds) <= MOST_KEPT_S:
        raise BadRequest(
            f"expires_after[seconds] must be {LEAST_KEPT_S}..{MOST_KEPT_S}, got {(seconds or '')[:40]!r}"
        )
    return float(seconds)
