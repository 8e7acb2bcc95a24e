"""``tidegate logs``: the log files of services and replicas."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer

from tidegate.cli.exits import UsageError
from tidegate.cli.options import Json
from tidegate.errors import NotFound

POLL_S = 0.25
BLOCK = 64 * 1024


def logs(
    name: Annotated[
        str, typer.Argument(metavar="SERVICE|REPLICA", help="Or a deployment: its newest replica.")
    ],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines are written.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many of the last lines.")] = 100,
    json: Json = False,
) -> None:
    """Show a log. A terminal gets readable lines, a pipe the JSON lines as they were written."""
    from tidegate.cli import output
    from tidegate.cli.api import settings

    if follow and json:
        raise UsageError("--json is one document, so it cannot follow; a pipe gets JSON lines anyway.")
    path = find(settings().state_path / "log", name)
    if json:
        output.dump({"file": str(path), "lines": [_parsed(text) for text in tail(path, lines)]})
        return
    readable = sys.stdout.isatty()
    for text in tail(path, lines):
        _show(text, readable)
    if follow:
        for text in following(path):
            _show(text, readable)


def find(folder: Path, name: str) -> Path:
    """The log of a service, a replica, or a deployment's newest replica. NotFound says what there is."""
    exact = [folder / f"{name}.log", folder / f"worker-{name}.log"]
    for path in exact:
        if path.parent == folder and path.is_file():
            return path
    of_deployment = [p for p in folder.glob("worker-*.log") if deployment_in(p.stem) == name]
    if of_deployment:
        return max(of_deployment, key=lambda path: path.stat().st_mtime)
    there = sorted(path.stem.removeprefix("worker-") for path in folder.glob("*.log"))
    known = f"there are {', '.join(there)}" if there else f"there is none in {folder}"
    raise NotFound(f"There is no log of {name!r}: {known}.")


def deployment_in(stem: str) -> str:
    """``worker-<deployment>-<slot>-<generation>`` -> ``<deployment>``."""
    return stem.removeprefix("worker-").rsplit("-", 2)[0]


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a file, read from its end."""
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
    """Lines as they are appended, for ever; starts over when the file is cut."""
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


def _show(text: str, readable: bool) -> None:
    sys.stdout.write((pretty(text) if readable else text) + "\n")
    sys.stdout.flush()


def _parsed(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return text


def pretty(text: str) -> str:
    """A JSON log line as ``time LEVEL message key=value``; other lines as they are."""
    fields = _parsed(text)
    if not isinstance(fields, dict) or "message" not in fields:
        return text
    when = str(fields.pop("time", ""))[11:23]
    level = str(fields.pop("level", "")).upper()
    message = str(fields.pop("message"))
    trace = fields.pop("exc_info", None)
    for key in ("service", "logger"):
        fields.pop(key, None)
    rest = " ".join(f"{key}={value}" for key, value in fields.items())
    shown = f"{when} {level:<7} {message} {rest}".rstrip()
    return f"{shown}\n{trace}" if trace else shown
