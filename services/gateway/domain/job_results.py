"""The form of a job's answer in the job's record, and the errors of jobs without a result. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.gateway.domain.contract import Decoded, WantedOutput
from tidegate.kernel.errors import BY_REASON, Conflict, DeadlinePassed, ModelFailed, TidegateError
from tidegate.kernel.protocol.jobs import Job


def answer_form(request: Decoded) -> dict[str, Any]:
    """Return the fields of a request that decide the form of its answer. Leave out default values."""
    form: dict[str, Any] = {}
    if request.id:
        form["id"] = request.id
    if request.binary:
        form["binary"] = True
    if request.wanted:
        form["outputs"] = [[output.name, output.binary, output.classes] for output in request.wanted]
    return form


def read_answer_form(form: Mapping[str, Any], binary: bool | None = None) -> Decoded:
    """Rebuild, from a job's record, the request fields that are needed to encode the job's answer.

    ``binary``: True or False overrides the form that the job requested; None keeps it.
    """
    outputs = form.get("outputs")
    wanted = None
    if outputs:
        wanted = tuple(
            WantedOutput(name, as_binary if binary is None else binary, classes)
            for name, as_binary, classes in outputs
        )
    default = bool(form.get("binary", False)) if binary is None else binary
    return Decoded(form.get("id", ""), 0, b"", [], wanted, default)


def prefers_binary(accept: bytes | None) -> bool | None:
    """Return True if an ``Accept`` header prefers binary, False if JSON, None if neither.

    If the result is None, the job's request decides.
    """
    if accept is None:
        return None
    accept = accept.lower()
    if b"application/octet-stream" in accept:
        return True
    return False if b"application/json" in accept and b"*/*" not in accept else None


def failure_of(job: Job) -> TidegateError:
    """Return the error that explains why a finished job has no result."""
    job_id = job.id.hex()
    if job.state == "cancelled":
        return Conflict(f"job {job_id} was cancelled", reason="cancelled")
    if job.state == "expired":
        return DeadlinePassed(
            f"job {job_id} expired before it was done: submit it again with a larger ttl_s", reason="expired"
        )
    error = job.error or {}
    reason = error.get("reason", ModelFailed.reason)
    return BY_REASON.get(reason, ModelFailed)(error.get("message", "the job failed"), reason=reason)
