"""``tidegate dead``: requests and jobs that were given up, with their payloads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tidegate.cli import output
from tidegate.cli.api import Doc, Service, control, part
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.options import Json, Limit
from tidegate.kernel.errors import TidegateError

dead = typer.Typer(
    name="dead",
    help="Dead letters: list, show, download, replay and delete requests that were given up.",
    invoke_without_command=True,
)

Id = Annotated[str, typer.Argument(metavar="ID", help="The letter's id, as `tidegate dead` lists it.")]
Deployment = Annotated[
    str | None, typer.Option("--deployment", metavar="NAME", help="Only the letters of this deployment.")
]


@dead.callback()
def listed(
    context: typer.Context,
    deployment: Deployment = None,
    cause: Annotated[
        str | None, typer.Option(metavar="WORD", help="attempts_exhausted, not_retried or undecodable.")
    ] = None,
    limit: Limit = 20,
    json: Json = False,
) -> None:
    """List the latest dead letters, newest first. The commands below act on them."""
    if context.invoked_subcommand is not None:
        return

    items = _router().items("/v1/dead", deployment=deployment, cause=cause, limit=limit)
    rows = [
        (
            item["letter"],
            output.moment(item["at"]),
            item["kind"],
            item["deployment"],
            item["cause"],
            item["tenant"],
            output.size_of(item["payload_bytes"]) if item["payload"] else None,
            len(item["replays"]) or None,
        )
        for item in items
    ]
    columns = ("letter", "at", "kind", "deployment", "cause", "of", "payload", "replays")
    output.show({"items": items}, json, lambda: output.table(rows, columns, "No dead letter."))


@dead.command()
def show(id: Id, json: Json = False) -> None:
    """Show one dead letter, and the results of its replays."""
    found = _router().get(_path(id))
    output.show(found, json, lambda: _print(found))


@dead.command()
def download(
    id: Id,
    output_file: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The file to write.")],
    json: Json = False,
) -> None:
    """Save a dead letter's request as a frame (docs/envelope.md). The file contains the caller's data."""
    size = save(_router(), id, output_file)
    told = {"file": str(output_file), "bytes": size}
    output.show(told, json, lambda: output.line(f"{output.size_of(size)} written to {output_file}"))


@dead.command()
def replay(
    id: Annotated[str | None, typer.Argument(metavar="[ID]", help="The letter's id.")] = None,
    all: Annotated[
        bool, typer.Option("--all", help="Replay all dead letters that were not replayed yet.")
    ] = False,
    deployment: Deployment = None,
    to: Annotated[
        str | None, typer.Option(metavar="NAME", help="Run on this deployment instead of the letter's own.")
    ] = None,
    json: Json = False,
) -> None:
    """Run one or all dead letters again, as jobs. `tidegate job ID --result` shows a job's result."""
    if all == (id is not None):
        raise UsageError("Give the id of one letter, or --all.")
    if id is not None:
        if deployment is not None:
            raise UsageError("--deployment needs --all. To choose where a letter runs, use --to.")
        found = _router().post(f"{_path(id)}/replay", {"to": to})
        output.show(found, json, lambda: _print(found))
        return
    items = _router().post("/v1/dead/replay", {"deployment": deployment, "to": to}, timeout=300.0)["items"]
    rows = [(item["letter"], item["job"], item["error"]) for item in items]
    columns = ("letter", "job", "error")
    empty = "No dead letter is left to replay."
    output.show({"items": items}, json, lambda: output.table(rows, columns, empty))


@dead.command()
def delete(id: Id, json: Json = False) -> None:
    """Delete a dead letter and its payload."""
    _router().delete(_path(id))
    output.show({"deleted": id}, json, lambda: output.line(f"{id} is deleted."))


def save(router: Service, id: str, file: Path) -> int:
    """Write a dead letter's payload to a file that only the user can read. Return the size in bytes."""
    part = file.with_name(f"{file.name}.part")
    size = 0
    try:
        part.touch(mode=0o600)
        with part.open("wb") as out:

            def take(piece: bytes) -> None:
                nonlocal size
                size += out.write(piece)

            router.download(f"{_path(id)}/payload", take)
        part.replace(file)
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}.") from None
    except TidegateError:
        part.unlink(missing_ok=True)
        raise
    return size


def _router() -> Service:
    return control().router


def _path(id: str) -> str:
    return f"/v1/dead/{part(id)}"


def _print(found: Doc) -> None:
    kept = output.size_of(found["payload_bytes"]) if found["payload"] else f"none: {found['missing']}"
    rows: list[tuple[str, Any]] = [
        ("letter", found["letter"]),
        ("at", output.moment(found["at"])),
        (found["kind"], found["id"]),
        ("deployment", found["deployment"]),
        ("cause", found["cause"]),
        ("of", found["tenant"]),
        ("attempts", found["attempt"]),
        ("trace", found["trace"]),
        ("payload", kept),
    ]
    for each in found["replays"]:
        error = each["error"] or {}
        told = f"{error['reason']}: {error['message']}" if error else ""
        state = each["status"] or "the job's record was deleted"
        rows.append(("replay", f"job {each['job']} on {each['to']}: {state} {told}".rstrip()))
    for name, value in rows:
        text = output.text_of(value)
        if text != "-":
            output.line(f"{name + ':':12}{text}")
