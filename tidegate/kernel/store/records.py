"""Convert jobs to arguments of the Lua scripts, and records of the store to jobs. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import orjson

from tidegate.kernel.protocol.jobs import Finish, Job, JobEvent, Level, NewJob, Outcome, State, Taken

_OUTCOMES: dict[str, Outcome] = {"r": "run", "d": "drop", "f": "failed", "e": "expired", "s": "suspect"}


Arguments = tuple[bytes | int, ...]


def to_accept(new: NewJob) -> Arguments:
    """Return the arguments of ``accept.lua`` for a job."""
    facts = {
        "model": new.model,
        "version": new.version,
        "ask": new.ask,
        "webhook": new.webhook,
        "line": new.line,
        "metadata": new.metadata,
    }
    key, body = b"", b""
    if new.idempotency is not None:
        key = key_digest(new.principal, new.idempotency.key)
        body = new.idempotency.body
    return (
        new.id,
        new.frame,
        orjson.dumps(facts),
        new.deployment.encode(),
        new.endpoint.encode(),
        new.principal.encode(),
        (new.batch or "").encode(),
        new.level.encode(),
        new.expires_ms,
        int(new.retry_safe),
        int(new.webhook is not None),
        key,
        body,
        new.created_ms,
    )


def key_digest(principal: str, key: str) -> bytes:
    """Return the hash under which the store keeps a principal's idempotency key."""
    return hashlib.sha256(f"{principal}\0{key}".encode()).digest()


def to_finish(end: Finish) -> Arguments:
    """Return the arguments of ``finish.lua`` for the end of an attempt."""
    error = orjson.dumps(end.error) if end.error else b""
    reason = end.error.get("reason", "") if end.error else ""
    return (
        end.id,
        end.attempt,
        end.state.encode(),
        end.reply,
        error,
        reason.encode(),
        end.wait_us,
        end.compute_us,
        end.used_us,
        end.tokens_in,
        end.tokens_out,
    )


def job(id: bytes, found: Mapping[bytes, bytes] | Sequence[bytes]) -> Job | None:
    """Return the job of a record, or None if the record has no fields.

    ``found``: the fields of the record, as a mapping, or as a flat sequence of names and values.
    """
    if not found:
        return None
    fields = found if isinstance(found, Mapping) else dict(zip(found[::2], found[1::2], strict=True))
    facts: dict[str, Any] = orjson.loads(fields[b"facts"])
    error = fields.get(b"error")
    batch = fields[b"batch"].decode()
    return Job(
        id=id,
        state=cast(State, fields[b"state"].decode()),
        attempt=int(fields[b"attempt"]),
        model=facts["model"],
        endpoint=fields[b"endpoint"].decode(),
        deployment=fields[b"deployment"].decode(),
        version=facts["version"],
        principal=fields[b"principal"].decode(),
        level=cast(Level, fields[b"level"].decode()),
        created_ms=int(fields[b"created"]),
        expires_ms=int(fields[b"expires"]),
        queued_ms=int(fields.get(b"queued", 0)),
        started_ms=int(fields.get(b"started", 0)),
        finished_ms=int(fields.get(b"finished", 0)),
        lease_ms=int(fields.get(b"lease", 0)),
        worker=fields.get(b"worker", b"").decode(),
        error=orjson.loads(error) if error else None,
        wait_us=int(fields.get(b"wait", 0)),
        compute_us=int(fields.get(b"compute", 0)),
        ask=facts["ask"],
        webhook=facts["webhook"],
        batch=batch or None,
        line=facts["line"],
        metadata=facts["metadata"],
        result_size=int(fields.get(b"size", 0)),
        retry_safe=fields[b"safe"] == b"1",
    )


def event(seq: int, line: bytes) -> JobEvent:
    """Return the event that one line of a job's log describes. ``seq``: the number of the event."""
    at, state, attempt, detail = line.decode().split(" ", 3)
    return JobEvent(seq, int(at), cast(State, state), int(attempt), detail)


def taken(text: str) -> Taken:
    """Return the outcome and the attempt from one answer of ``take.lua``."""
    outcome, attempt = text.split(" ")
    return Taken(_OUTCOMES[outcome], int(attempt))


def totals(flat: Sequence[bytes]) -> dict[str, int]:
    """Return counts by name. ``flat``: names and values in turn, as the store returns them."""
    return {name.decode(): int(value) for name, value in zip(flat[::2], flat[1::2], strict=True)}
