"""A batch in OpenAI's API: its request, its state and its times. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson

from services.gateway.domain.batches import Batch
from services.gateway.domain.openai.facts import OpenAiFacts
from services.gateway.domain.openai.files import file_name, read_file_id
from tidegate.kernel.errors import BadRequest, NotFound, TidegateError
from tidegate.kernel.protocol.jobs import read_id

PREFIX = "batch_"
# Names in a batch's counts: the lines and the bytes of its output file and of its error file.
OUTPUT_LINES, OUTPUT_BYTES = "output_lines", "output_bytes"
ERROR_LINES, ERROR_BYTES = "error_lines", "error_bytes"
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
MAX_WINDOW_S = 30 * 86_400
# OpenAI's limits for metadata: the number of pairs, the characters of a name, and the characters of a value.
MAX_PAIRS, MAX_NAME, MAX_VALUE = 16, 64, 512
_WINDOW = re.compile(r"([1-9]\d{0,6})([smhd])")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class BatchRequest(NamedTuple):
    """A request of ``POST /v1/batches`` that was checked.

    ``window``: the completion window as the caller wrote it, such as ``24h``. ``window_s``: the same in
    seconds.
    """

    input_file: bytes
    endpoint: str
    window: str
    window_s: int
    metadata: dict[str, str]


def read_batch_request(document: Mapping[str, Any]) -> BatchRequest:
    """Read the body of ``POST /v1/batches``.

    Raise BadRequest if a field is wrong, and NotFound if ``input_file_id`` does not have the form of a file's
    id.
    """
    file_id, endpoint = document.get("input_file_id"), document.get("endpoint")
    window = document.get("completion_window")
    if not isinstance(file_id, str):
        raise BadRequest("'input_file_id' must be the id of a file: upload one with POST /v1/files")
    if endpoint not in ENDPOINTS:
        raise BadRequest(f"'endpoint' must be one of {', '.join(ENDPOINTS)}, got {str(endpoint)[:60]!r}")
    match = _WINDOW.fullmatch(window) if isinstance(window, str) else None
    seconds = int(match[1]) * _UNITS[match[2]] if match is not None else 0
    if not 0 < seconds <= MAX_WINDOW_S:
        raise BadRequest(
            f"'completion_window' must be a number with s, m, h or d, up to 30d, such as '24h', "
            f"got {str(window)[:40]!r}"
        )
    return BatchRequest(
        read_file_id(file_id), endpoint, str(window), seconds, _check_metadata(document.get("metadata"))
    )


def is_batch_request(document: Any) -> bool:
    """Return True if a JSON body is for OpenAI's ``POST /v1/batches`` and is no request with tensors."""
    return isinstance(document, dict) and "input_file_id" in document and "inputs" not in document


def _check_metadata(value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_PAIRS:
        raise BadRequest(f"'metadata' must be an object of at most {MAX_PAIRS} strings")
    for name, text in value.items():
        if len(name) > MAX_NAME or not isinstance(text, str) or len(text) > MAX_VALUE:
            raise BadRequest(
                f"'metadata' must have names up to {MAX_NAME} characters and strings up to {MAX_VALUE}; "
                f"the pair with the name {name[:MAX_NAME]!r} breaks this rule"
            )
    return value


def batch_name(id_: bytes) -> str:
    """Return a batch's id as OpenAI's API shows it."""
    return PREFIX + id_.hex()


def read_batch_id(text: str) -> bytes:
    """Convert a batch's id in OpenAI's API to its internal id.

    Raise NotFound if ``text`` does not have the form of a batch's id.
    """
    id_ = read_id(text.removeprefix(PREFIX)) if text.startswith(PREFIX) else None
    if id_ is None:
        raise no_batch(text)
    return id_


def no_batch(text: str) -> NotFound:
    """Return the error for a batch that does not exist."""
    return NotFound(
        f"there is no batch {text[:64]!r}: GET /v1/batches lists your batches", reason="no_such_batch"
    )


def status_of(batch: Batch) -> str:
    """Return OpenAI's status of a batch."""
    if batch.state == "running":
        if not batch.validated_ms:
            return "validating"
        return "finalizing" if batch.lines and batch.done >= batch.lines else "in_progress"
    return batch.state


def errors_of(batch: Batch) -> dict[str, Any] | None:
    """Return why a batch failed: the bad lines of its file, or one reason for the whole batch."""
    if not batch.error:
        return None
    if batch.error.startswith("["):
        return {"object": "list", "data": orjson.loads(batch.error)}
    error = {"code": "batch_failed", "message": batch.error, "param": None, "line": None}
    return {"object": "list", "data": [error]}


def public(batch: Batch, facts: OpenAiFacts) -> dict[str, Any]:
    """Return a batch as OpenAI's API shows it."""
    counts, status = batch.counts, status_of(batch)
    failed = counts.get("failed", 0) + counts.get("expired", 0)

    def at(*states: str) -> int | None:
        return batch.finished_ms // 1000 if batch.state in states and batch.finished_ms else None

    return {
        "id": batch_name(batch.id),
        "object": "batch",
        "endpoint": facts.endpoint,
        "model": batch.model or None,
        "errors": errors_of(batch),
        "input_file_id": file_name(facts.input_file),
        "completion_window": facts.window,
        "status": status,
        "output_file_id": file_name(facts.output_file) if batch.over and counts.get(OUTPUT_LINES) else None,
        "error_file_id": file_name(facts.error_file) if batch.over and counts.get(ERROR_LINES) else None,
        "created_at": batch.created_ms // 1000,
        "in_progress_at": batch.validated_ms // 1000 or None,
        "expires_at": facts.expires_ms // 1000,
        "finalizing_at": at("completed", "expired"),
        "completed_at": at("completed"),
        "failed_at": at("failed"),
        "expired_at": at("expired"),
        "cancelling_at": batch.cancelling_ms // 1000 or None,
        "cancelled_at": at("cancelled"),
        "request_counts": {
            "total": batch.lines if batch.validated_ms else 0,
            "completed": counts.get("succeeded", 0),
            "failed": failed,
        },
        "metadata": facts.metadata or None,
    }


def check_cancel(batch: Batch) -> TidegateError | None:
    """Return the error if a batch cannot be cancelled; None if it can, or if it is already cancelled."""
    if batch.over and batch.state != "cancelled":
        return BadRequest(f"batch {batch_name(batch.id)} is {batch.state}, so it cannot be cancelled")
    return None
