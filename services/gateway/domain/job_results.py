"""What a job's caller wants back, kept with the job, and how it is read again: pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.gateway.domain.contract import Decoded, WantedOutput
from tidegate.kernel.errors import BY_REASON, Conflict, DeadlinePassed, ModelFailed, TidegateError
from tidegate.kernel.protocol.jobs import Job


def ask_of(request: Decoded) -> dict[str, Any]:
    """The part of a request that says how its answer is written: what is not the default."""
    ask: dict[str, Any] = {}
    if request.id:
        ask["id"] = request.id
    if request.binary:
        ask["binary"] = True
    if request.wanted:
        ask["outputs"] = [[output.name, output.binary, output.classes] for output in request.wanted]
    return ask


def read_ask(ask: Mapping[str, Any], binary: bool | None = None) -> Decoded:
    """The request as the encoder of its answer needs it. ``binary`` replaces the form that was asked for."""
    outputs = ask.get("outputs")
    wanted = None
    if outputs:
        wanted = tuple(
            WantedOutput(name, form if binary is None else binary, classes) for name, form, classes in outputs
        )
    default = bool(ask.get("binary", False)) if binary is None else binary
    return Decoded(ask.get("id", ""), 0, b"", [], wanted, default)


def form(accept: bytes | None) -> bool | None:
    """The form that an ``Accept`` header wants of a result: binary or JSON; None: as asked when submitted."""
    if accept is None:
        return None
    accept = accept.lower()
    if b"application/octet-stream" in accept:
        return True
    return False if b"application/json" in accept and b"*/*" not in accept else None


def failure_of(job: Job) -> TidegateError:
    """Why a job that is over has no result."""
    shown = job.id.hex()
    if job.state == "cancelled":
        return Conflict(f"job {shown} was cancelled", reason="cancelled")
    if job.state == "expired":
        return DeadlinePassed(f"job {shown} expired before it was done", reason="expired")
    told = job.error or {}
    reason = told.get("reason", ModelFailed.reason)
    return BY_REASON.get(reason, ModelFailed)(told.get("message", "the job failed"), reason=reason)
