"""``tidegate jobs`` and ``tidegate job``: durable jobs through the gateway."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from tidegate.cli import api, output
from tidegate.cli.api import Doc, Service, part
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.options import Json, Limit, seconds
from tidegate.kernel.errors import Conflict, DeadlinePassed

POLL_S = 20
Id = Annotated[str, typer.Argument(metavar="ID", help="The job's id.")]


def jobs(
    status: Annotated[
        str | None,
        typer.Option(
            help="Only jobs in this state: queued, running, succeeded, failed, cancelled or expired."
        ),
    ] = None,
    endpoint: Annotated[str | None, typer.Option(help="Only jobs of this endpoint.")] = None,
    batch: Annotated[str | None, typer.Option(metavar="ID", help="Only jobs of this batch.")] = None,
    limit: Limit = 20,
    json: Json = False,
) -> None:
    """List the latest jobs, newest first."""
    items = gateway().items("/v1/jobs", status=status, endpoint=endpoint, batch=batch, limit=limit)
    rows = [
        (
            item["id"],
            item["status"],
            item["endpoint"],
            item["priority"],
            output.moment(item["created_at"]),
            item["attempts"],
            item["worker"],
            (item["timing"] or {}).get("total_ms"),
            (item["error"] or {}).get("reason"),
        )
        for item in items
    ]
    columns = ("job", "status", "endpoint", "priority", "created", "attempts", "worker", "total ms", "error")
    output.show({"items": items}, json, lambda: output.table(rows, columns, "No job."))


def job(
    id: Id,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the job has ended.")] = False,
    timeout: Annotated[str, typer.Option(help="Longest time that --wait waits.")] = "1h",
    cancel: Annotated[bool, typer.Option("--cancel", help="Cancel the job.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Retry a failed job, as a new job.")] = False,
    result: Annotated[bool, typer.Option("--result", help="Show the job's result, not its state.")] = False,
    output_file: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Save the job's result as JSON.")
    ] = None,
    json: Json = False,
) -> None:
    """Show a job's state, times and error. Options cancel it, retry it, or get its result."""
    if sum((cancel, retry, result or output_file is not None)) > 1:
        raise UsageError("--cancel, --retry and --result (or --output) exclude each other.")
    service, path = gateway(), f"/v1/jobs/{part(id)}"
    if cancel:
        found = service.delete(path)
    elif retry:
        found = service.post(f"{path}/retry", None)
        path = f"/v1/jobs/{part(found['id'])}"
    else:
        found = service.get(path)
    if wait:
        found = _waited(service, path, found, seconds(timeout))
    if result or output_file is not None:
        _show_result(service, path, found, output_file)
        return
    output.show(found, json, lambda: _print(found))


def gateway() -> Service:
    """Return a client of the gateway's API.

    If no API key is set, use the service token. This token may read the jobs of all callers.
    """
    found = api.settings()
    return api.Service("gateway", found.gateway_url, api.token_of(found))


def _waited(service: Service, path: str, found: Doc, timeout_s: float) -> Doc:
    deadline = time.monotonic() + timeout_s
    while not found["finished_at"]:
        left = deadline - time.monotonic()
        if left <= 0:
            raise DeadlinePassed(
                f"The job is still {found['status']} after {timeout_s:g} s. To wait longer: --timeout TIME"
            )
        found = service.get_waiting(path, min(POLL_S, left))
    return found


def _show_result(service: Service, path: str, found: Doc, file: Path | None) -> None:
    import orjson

    answer = service.get(f"{path}/result")
    if not found["finished_at"] and "outputs" not in answer:
        raise Conflict(
            f"The job is {found['status']} and has no result yet. Wait for it: tidegate job ID --wait."
        )
    if file is None:
        output.dump(answer)
        return
    try:
        file.write_bytes(orjson.dumps(answer))
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}.") from None
    output.say(f"Written to {file}.")


def _print(found: Doc) -> None:
    error = found["error"] or {}
    rows: list[tuple[str, Any]] = [
        ("job", found["id"]),
        ("status", found["status"]),
        ("endpoint", f"{found['endpoint']} (version {found['version']}, deployment {found['deployment']})"),
        ("priority", found["priority"]),
        ("of", found["principal"]),
        ("created", output.moment(found["created_at"])),
        ("started", output.moment(found["started_at"])),
        ("finished", output.moment(found["finished_at"])),
        ("expires", output.moment(found["expires_at"])),
        ("jobs before it", found["position"]),
        ("start expected", output.moment(found["estimated_start"])),
        ("attempts", found["attempts"] or None),
        ("worker", found["worker"]),
        ("times", {name.removesuffix("_ms"): f"{ms:.1f}ms" for name, ms in found["timing"].items()}),
        ("error", f"{error['reason']}: {error['message']}" if error else None),
        ("webhook", found["webhook"]),
        ("batch", found["batch"]),
        ("retry of", found["retry_of"]),
        ("metadata", found["metadata"]),
    ]
    for name, value in rows:
        text = output.text_of(value)
        if text != "-":
            output.line(f"{name + ':':16}{text}")
