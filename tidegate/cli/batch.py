"""``tidegate batch``: run a file of requests as jobs, and write their results in the same order."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from tidegate.cli import output
from tidegate.cli.api import Doc, Service
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.options import Json, seconds
from tidegate.cli.output import console, say
from tidegate.cli.progress import transfer

POLL_S = 0.5
PIECE = 2**20


def batch(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE|ID", help="A file of requests, one JSON object per line; or the id of a batch."
        ),
    ],
    model: Annotated[str | None, typer.Option(help="The endpoint for lines that name none.")] = None,
    version: Annotated[str | None, typer.Option(help="The version for lines that name none.")] = None,
    priority: Annotated[str, typer.Option(help="high, normal or low.")] = "low",
    ttl: Annotated[
        str | None, typer.Option(help="Time after which a queued request expires, such as 2h.")
    ] = None,
    output_file: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Results; default: stdout.")
    ] = None,
    wait: Annotated[bool, typer.Option(help="Wait for the results; the batch continues either way.")] = True,
    cancel: Annotated[bool, typer.Option("--cancel", help="Cancel a batch.")] = False,
    json: Json = False,
) -> None:
    """Run a file of requests. The results have one line for each request, in the same order.

    A line is the body of an inference request, {"inputs": [{"name": ..., "datatype": ..., "shape": ...,
    "data": ...}]}. Ctrl-C stops the wait, not the batch: `tidegate batch ID` waits again.
    Example: tidegate batch requests.jsonl --model digits -o results.jsonl
    """
    from tidegate.cli.jobs import gateway

    service = gateway()
    if re.fullmatch(r"[0-9a-f]{32}", file) and not Path(file).exists():
        path = f"/v1/batches/{file}"
        found = service.delete(path) if cancel else service.get(path)
    elif cancel:
        raise UsageError("--cancel needs the id of a batch, not a file.")
    else:
        found = _create(service, Path(file), model, version, priority, ttl)
        output.say(f"batch {found['id']}: {found['lines']} lines")
    if wait and not cancel:
        found = _followed(service, found)
        _results(service, found, output_file, json=json)
    if json:
        output.dump(found)
    elif not wait or cancel:
        output.line(found["id"])
    output.say(_summary(found))
    if wait and not cancel and found["counts"]["succeeded"] < found["lines"]:
        raise typer.Exit(1)


def _create(
    service: Service, file: Path, model: str | None, version: str | None, priority: str, ttl: str | None
) -> Doc:
    query = {"model": model, "version": version, "priority": priority}
    if ttl is not None:
        query["ttl_s"] = str(seconds(ttl))
    try:
        size = file.stat().st_size
        with file.open("rb") as source, transfer(file.name, size) as advance:

            def pieces() -> Iterator[bytes]:
                while piece := source.read(PIECE):
                    yield piece
                    advance(len(piece))

            created: Doc = service.send_lines("/v1/batches", pieces(), **query)
            return created
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror or error}.") from None


def _followed(service: Service, found: Doc) -> Doc:
    """Show the progress of a batch until it ends. Return the ended batch."""
    with _bar(found["lines"]) as show:
        while not found["finished_at"]:
            show(found["done"])
            time.sleep(POLL_S)
            found = service.get(found["urls"]["status"])
        show(found["done"])
    return found


@contextmanager
def _bar(total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on a terminal. Elsewhere print a line after each tenth of the batch.

    The ``with`` block gets a function. It must call this function with the number of lines that are done.
    """
    if console(stderr=True).is_terminal:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("lines"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console(stderr=True)) as progress:
            task = progress.add_task("lines", total=total)
            yield lambda done: progress.update(task, completed=done)
        return
    told = 0

    def tell(done: int) -> None:
        nonlocal told
        if (tenth := 10 * done // max(total, 1)) > told:
            told = tenth
            say(f"{done} of {total} lines")

    yield tell


def _results(service: Service, found: Doc, file: Path | None, *, json: bool) -> None:
    if file is None and json:
        return  # with --json, stdout gets the batch's document instead
    path = found["urls"]["results"]
    if file is None:
        service.download(path, sys.stdout.buffer.write)
        sys.stdout.flush()
        return
    try:
        with file.open("wb") as target:
            service.download(path, target.write)
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror or error}.") from None


def _summary(found: Doc) -> str:
    counts = ", ".join(f"{count} {outcome}" for outcome, count in found["counts"].items() if count)
    return f"batch {found['id']}: {found['status']}; {counts or '0 ended'} of {found['lines']} lines"
