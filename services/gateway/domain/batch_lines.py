"""A line of a batch: the request in it, and the line of its result. Pure."""

from __future__ import annotations

from typing import Any, NamedTuple

import orjson

from services.gateway.domain import job_options
from services.gateway.domain.batches import Batch
from services.gateway.domain.contract import check_name
from services.gateway.domain.job_options import JobOptions
from tidegate.kernel.errors import BadRequest, TidegateError
from tidegate.kernel.protocol import bounded_json


class BatchLine(NamedTuple):
    """What a line asks for. ``head`` is an inference request, with or without fields of a job."""

    model: str
    version: str
    head: dict[str, Any]
    options: JobOptions


def read_line(raw: bytes, batch: Batch) -> BatchLine:
    """The request in a line; the batch's own model and options where it names none. Raises BadRequest."""
    head = read_object(raw)
    if head.get("webhook") is not None:
        raise BadRequest("a line of a batch has no webhook of its own")
    base = JobOptions(batch.level, batch.ttl_s)
    model = head.get("model") or batch.model
    if not isinstance(model, str) or not model:
        raise BadRequest(
            "neither the line nor the batch names a model: give each line a `model`, or the batch one"
        )
    check_name("model", model)
    version = job_options.check_version(head.get("version") or batch.version)
    return BatchLine(model, version, head, job_options.from_fields(head, base))


def read_object(raw: bytes) -> dict[str, Any]:
    """A line's JSON object; raises BadRequest, PayloadTooLarge."""
    found = bounded_json.loads(raw, "the line")
    if not isinstance(found, dict):
        raise BadRequest("the line is not a JSON object")
    return found


def line_id(raw: bytes) -> str | None:
    """The id that a line has by its caller's own choice."""
    try:
        found = read_object(raw).get("id")
    except TidegateError:
        return None
    return found if isinstance(found, str) else None


def result_line(number: int, id_: str | None, job: str | None, response: bytes) -> bytes:
    """The line of a result; ``response`` is JSON."""
    head = orjson.dumps({"line": number, "id": id_, "job": job, "status": "succeeded"})
    return b'%b,"response":%b}' % (head[:-1], response)


def failed_line(number: int, id_: str | None, job: str | None, status: str, error: TidegateError) -> bytes:
    """The line of a request that has no result."""
    told = {"reason": error.reason, "message": error.message}
    return orjson.dumps({"line": number, "id": id_, "job": job, "status": status, "error": told})
