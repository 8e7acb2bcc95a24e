"""``tidegate feedback``: report how good an answer was."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from tidegate.cli import output
from tidegate.cli.api import settings, token_of, unreachable
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.options import Json
from tidegate.client.errors import Unreachable


def feedback(
    id: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="The X-Feedback-Id of an answer, or a job's id.")
    ] = None,
    score: Annotated[
        float | None, typer.Option(metavar="NUMBER", help="The answer's score, as a number.")
    ] = None,
    reward: Annotated[float | None, typer.Option(metavar="NUMBER", help="A reward.")] = None,
    label: Annotated[str | None, typer.Option(metavar="TEXT", help="The true class, as a label.")] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="One other metric. A value that is no number is a label."),
    ] = None,
    at: Annotated[
        str | None, typer.Option(metavar="TIME", help="The time of the outcome, ISO 8601; default: now.")
    ] = None,
    key: Annotated[
        str | None, typer.Option("--key", metavar="KEY", help="Instead of ID: the idempotency key of a job.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", metavar="FILE", help="A file of feedback in JSON Lines; - reads stdin."),
    ] = None,
    json: Json = False,
) -> None:
    """Report how good an answer was, or report on many answers from a file.

    For each answer, only the first value of a metric is stored. So a repeated command changes nothing. The
    exit code is 1 if lines of a file are refused. Example: tidegate feedback fb1.WyJk... --score 0.9
    """
    from tidegate.client import Client

    given = {"score": score, "reward": reward, "label": label, "at": at} | metric_of(metric)
    outcomes = {name: value for name, value in given.items() if value is not None}
    if file is not None and (id or key or outcomes):
        raise UsageError("The file of --file has the ids and outcomes. Leave out all other options.")
    if file is None and bool(id) == bool(key):
        raise UsageError("Name the answer by ID or by --key, or give --file.")
    if file is None and not outcomes.keys() - {"at"}:
        raise UsageError("Give an outcome: --score, --reward, --label or --metric NAME=VALUE.")
    found = settings()
    try:
        with Client(found.gateway_url, api_key=token_of(found) or None) as client:
            if file is None:
                name = {"request_id": id} if id else {"idempotency_key": key}
                items = client._run(client._feedback.one(name | outcomes, None))["items"]
            else:
                items = client.feedback_many(lines_of(file))
    except Unreachable:
        raise unreachable("gateway", found.gateway_url) from None
    document = summary_of(items)
    output.show(document, json, lambda: _print(document))
    if document["refused"]:
        raise typer.Exit(1)


def metric_of(texts: list[str] | None) -> dict[str, Any]:
    """Parse ``--metric NAME=VALUE`` as a dict with the keys ``metric`` and ``value``.

    Without the option, return an empty dict. Raise UsageError if the option has another form or is given
    twice.
    """
    if not texts:
        return {}
    name, equals, text = texts[0].partition("=")
    if len(texts) > 1 or not equals or not name or not text:
        raise UsageError("--metric: write one NAME=VALUE, as in --metric clicks=3. For more, use --file.")
    try:
        return {"metric": name, "value": float(text)}
    except ValueError:
        return {"metric": name, "value": text}


def lines_of(file: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the objects of a file of JSON Lines.

    Raise UsageError if the file cannot be read, or if a line is not a JSON object. The error contains the
    number of this line.
    """
    import orjson

    try:
        with nullcontext(sys.stdin.buffer) if str(file) == "-" else file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    item = orjson.loads(line)
                except orjson.JSONDecodeError as error:
                    raise UsageError(f"{file}, line {number}: {error}.") from None
                if not isinstance(item, dict):
                    raise UsageError(f"{file}, line {number}: each line must be a JSON object.")
                yield item
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}.") from None


def summary_of(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the number of items by status, and the refused items as ``problems``."""
    refused = [item for item in items if item["status"] not in ("accepted", "duplicate")]
    return {
        "accepted": sum(item["status"] == "accepted" for item in items),
        "duplicate": sum(item["status"] == "duplicate" for item in items),
        "refused": len(refused),
        "problems": refused,
    }


def _print(document: Mapping[str, Any]) -> None:
    counts = ", ".join(f"{document[name]} {name}" for name in ("accepted", "duplicate", "refused"))
    output.line(counts)
    for item in document["problems"][:20]:
        output.line(f"item {item['index'] + 1}: {item['status']}: {item['message']}")
