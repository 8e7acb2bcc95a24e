"""Parse the request lines of a batch, and format the lines of their results. Pure."""

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
    """A parsed request line. ``head``: the inference request, which may contain the options of its job."""

    model: str
    version: str
    head: dict[str, Any]
    options: JobOptions


def read_line(raw: bytes, batch: Batch) -> BatchLine:
    """Parse a line. The batch's model and options are the defaults. Raises BadRequest."""
    head = read_object(raw)
    if head.get("webhook") is not None:
        raise BadRequest("a line of a batch cannot have a webhook: leave it out and poll the batch")
    base = JobOptions(batch.level, batch.ttl_s)
    model = head.get("model") or batch.model
    if not isinstance(model, str) or not model:
        raise BadRequest(
            "neither the line nor the batch names a model: set `model` in each line or for the batch"
        )
    check_name("model", model)
    version = job_options.check_version(head.get("version") or batch.version)
    return BatchLine(model, version, head, job_options.from_fields(head, base))


def read_object(raw: bytes) -> dict[str, Any]:
    """Return a line's JSON object. Raises BadRequest or PayloadTooLarge."""
    value = bounded_json.loads(raw, "the line")
    if not isinstance(value, dict):
        raise BadRequest("the line is not a JSON object")
    return value


def line_id(raw: bytes) -> str | None:
    """Return the id that the caller gave to a line, or None."""
    try:
        value = read_object(raw).get("id")
    except TidegateError:
        return None
    return value if isinstance(value, str) else None


def result_line(number: int, id_: str | None, job: str | None, response: bytes) -> bytes:
    """Return the result line of a request that succeeded. ``response`` is JSON."""
    head = orjson.dumps({"line": number, "id": id_, "job": job, "status": "succeeded"})
    return b'%b,"response":%b}' % (head[:-1], response)


def failed_line(number: int, id_: str | None, job: str | None, status: str, error: TidegateError) -> bytes:
    """Return the result line of a request that did not succeed."""
    problem = {"reason": error.reason, "message": error.message}
    return orjson.dumps({"line": number, "id": id_, "job": job, "status": status, "error": problem})
