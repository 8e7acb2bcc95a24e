"""``tidegate logs``: the logs of services, replicas and models, or all lines about one request."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import typer

from tidegate.cli import output
from tidegate.cli.api import settings
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.options import Json
from tidegate.cli.output import plain
from tidegate.kernel.errors import NotFound, Unavailable

if TYPE_CHECKING:
    from tidegate.cli.log_source import Source

POLL_S = 0.25
FOLLOW_S = 0.5
BLOCK = 64 * 1024
# A time in the far future, in seconds since 1970. A search that ends at this time excludes no log line.
EVER = 1e11


def logs(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="A service or a replica. A deployment or an endpoint: all its replicas, also ended ones.",
        ),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Keep running and show new lines, also of new replicas.")
    ] = False,
    tail: Annotated[
        int, typer.Option("--tail", "--lines", "-n", min=0, max=10_000, help="Number of last lines to show.")
    ] = 100,
    since: Annotated[
        str | None, typer.Option("--since", help="Only newer lines: 30s, 10m, 2h, 1d, or an ISO time.")
    ] = None,
    request: Annotated[
        str | None,
        typer.Option(
            "--request",
            help="Id of a request or job: show its lines in the logs of gateway, worker and router.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Show logs, with the model's own output (print, logging). If stdout is a pipe, print JSON lines.

    Examples: `tidegate logs digits -f`, `tidegate logs digits --since 10m`, `tidegate logs gateway`,
    `tidegate logs --request 6ecec3572916c219`.
    """
    from tidegate.cli.log_source import Local, source

    if follow and json:
        raise UsageError(
            "--json prints one document, so it excludes --follow. To follow as JSON lines, leave out --json "
            "and pipe the output."
        )
    if (name is None) == (request is None):
        raise UsageError("Give either a NAME or --request ID.")
    found = source(settings())
    if request is not None:
        _show_request(found, request, json=json)
        return
    assert name is not None
    after = _since(since)
    file = found.file(name) if isinstance(found, Local) else None
    if file is not None and since is None:
        _show_file(file, tail, follow=follow, json=json)
    else:
        _show_merged(found, name, tail, after, follow=follow, json=json)


def _since(text: str | None) -> float:
    from tidegate.kernel.protocol import log_lines

    if text is None:
        return -1.0
    try:
        return log_lines.since(text, time.time())
    except ValueError as error:
        raise UsageError(f"--since {error}.") from None


def _show_file(path: Path, lines: int, *, follow: bool, json: bool) -> None:
    """Show the log file of a service, including lines without a time."""
    if json:
        output.dump({"file": str(path), "lines": [_parsed(text) for text in tail(path, lines)]})
        return
    readable = sys.stdout.isatty()
    for text in tail(path, lines):
        _write(pretty(text) if readable else text)
    if follow:
        for text in following(path):
            _write(pretty(text) if readable else text)


def _show_merged(found: Source, name: str, lines: int, after: float, *, follow: bool, json: bool) -> None:
    from tidegate.kernel.log_files import SETTLE_S

    until = time.time() - SETTLE_S if follow else EVER
    first = found.read(name, since=after, until=until, lines=lines)
    if json:
        output.dump({"name": name, "lines": first})
        return
    _show_lines(first)
    while follow:
        time.sleep(FOLLOW_S)
        before, until = until, time.time() - SETTLE_S
        try:
            _show_lines(found.read(name, since=before, until=until, lines=10_000))
        except (NotFound, Unavailable):
            until = before  # the next read repeats this time span: the stack may only be restarting


def _show_request(found: Source, id_: str, *, json: bool) -> None:
    from tidegate.kernel.protocol.request_ids import LONGEST_ID

    lines = found.of_request(id_[:LONGEST_ID])
    if not lines:
        raise NotFound(nothing_of(id_))
    if json:
        output.dump({"request": id_, "lines": lines})
    else:
        _show_lines(lines)


def nothing_of(id_: str) -> str:
    """Return the possible reasons why no log mentions a request, and the commands that help."""
    return (
        f"No log has a line of {id_!r}. A line appears within a second. Under load, only a sample of the "
        "successful requests is logged. To log all of them: tidegate settings set ACCESS_LOG_SAMPLE=1. Old "
        "lines are deleted (TIDEGATE_ACCESS_LOG_DAYS). In containers, search the output of the gateway and "
        "the router: `docker compose logs gateway router | grep ID`."
    )


def _show_lines(lines: list[dict[str, Any]]) -> None:
    readable = sys.stdout.isatty()
    for line in lines:
        _write(prefixed(line) if readable else orjson.dumps(line, default=str).decode())


def _write(text: str) -> None:
    # A pipe gets the text unchanged. For a terminal, control characters are escaped. They may come from a
    # model or a caller, who could change the terminal with them.
    if sys.stdout.isatty():
        text = plain(text)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def tail(path: Path, lines: int) -> list[str]:
    """Return the last lines of a file, read from its end."""
    with path.open("rb") as file:
        at, data = file.seek(0, 2), b""
        while at > 0 and data.count(b"\n") <= lines:
            step = min(BLOCK, at)
            at -= step
            file.seek(at)
            data = file.read(step) + data
    found = data.decode(errors="replace").splitlines()
    return found[-lines:] if lines else []


def following(path: Path) -> Iterator[str]:
    """Yield each line that is appended to a file, and never end.

    If the file gets shorter, read it again from its start.
    """
    rest, at = b"", path.stat().st_size
    while True:
        size = path.stat().st_size if path.exists() else 0
        if size < at:
            rest, at = b"", 0
        if size > at:
            with path.open("rb") as file:
                file.seek(at)
                data = rest + file.read(size - at)
            at = size
            *whole, rest = data.split(b"\n")
            yield from (line.decode(errors="replace") for line in whole)
        else:
            time.sleep(POLL_S)


def _parsed(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return text


def prefixed(line: dict[str, Any]) -> str:
    """Format a line of merged logs as ``time log | text``. Here, ``log`` is the name of the log."""
    log, fields = str(line["log"]), {key: value for key, value in line.items() if key != "log"}
    if fields.get("source") == "model":
        return f"{_clock(fields)} {log} | {fields['message']}"
    text = pretty(orjson.dumps(fields, default=str).decode())
    when, _, rest = text.partition(" ")
    return f"{when} {log} | {rest}"


def pretty(text: str) -> str:
    """Format a JSON log line as ``time LEVEL message key=value``; return other lines unchanged."""
    fields = _parsed(text)
    if not isinstance(fields, dict) or "message" not in fields:
        return text
    when = _clock(fields)
    level = str(fields.pop("level", "")).upper()
    message = str(fields.pop("message"))
    traces = [str(fields.pop(key)) for key in ("exc_info", "traceback") if fields.get(key)]
    for key in ("time", "service", "logger", "source", "color_message"):
        fields.pop(key, None)
    rest = " ".join(f"{key}={value}" for key, value in fields.items())
    shown = f"{when} {level:<7} {message} {rest}".rstrip()
    return "\n".join([shown, *traces])


def _clock(fields: dict[str, Any]) -> str:
    return str(fields.get("time", ""))[11:23]
