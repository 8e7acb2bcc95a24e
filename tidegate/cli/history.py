"""History: ``audit`` lists who changed what, and ``usage`` counts the requests of each key."""

from __future__ import annotations

import sys
from datetime import date, datetime, timedelta, timezone
from typing import Annotated, Any
from urllib.parse import urlencode

import typer

from tidegate.cli import output
from tidegate.cli.api import control
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.options import Json, Limit, seconds

_DAY_S = 86_400


def audit(
    kind: Annotated[
        str | None,
        typer.Option(
            metavar="KIND", help="Only this kind: version, alias, policy, deployment, endpoint or key."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help=("Only changes to the object with this name."))
    ] = None,
    by: Annotated[str | None, typer.Option(metavar="ID", help="Only changes by this principal.")] = None,
    limit: Limit = 20,
    json: Json = False,
) -> None:
    """List changes, newest first, each with its time, principal, object and source address."""
    query = {"kind": kind, "name": name, "principal": by, "limit": min(limit, 1000)}
    page = control().registry.get("/v1/audit", **query)
    rows = [
        (
            output.moment(entry["at"]),
            entry["principal_name"],
            entry["origin"],
            entry["action"],
            f"{entry['kind']} {entry['name']}",
            differences(entry["before"], entry["after"]),
        )
        for entry in page["items"]
    ]
    columns = ("when", "who", "from", "action", "what", "changed")
    output.show(page, json, lambda: output.table(rows, columns, "No change yet."))


def differences(before: dict[str, Any] | None, after: dict[str, Any] | None) -> str:
    """Return the fields that differ, as ``name: old -> new``; empty if the object was created or deleted."""
    if before is None or after is None:
        return ""
    names = [name for name in after if before.get(name) != after[name]]
    return ", ".join(f"{name}: {_short(before.get(name))} -> {_short(after[name])}" for name in names)


def _short(value: Any) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def usage(
    since: Annotated[
        str, typer.Option(metavar="WHEN", help="First day: 2026-01-31, or 7d for the last seven.")
    ] = "7d",
    until: Annotated[str | None, typer.Option(metavar="DAY", help="Last day, inclusive.")] = None,
    by: Annotated[
        str,
        typer.Option(
            metavar="COLUMNS", help="Columns to sum by, separated by commas: day, principal, endpoint."
        ),
    ] = "principal,endpoint",
    key: Annotated[str | None, typer.Option(metavar="ID", help="Only usage of this principal.")] = None,
    endpoint: Annotated[str | None, typer.Option(metavar="NAME", help="Only usage of this endpoint.")] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV, for spreadsheets.")] = False,
    json: Json = False,
) -> None:
    """Show usage on whole days (UTC): requests, model time, bytes and tokens."""
    query = {"since": day_of(since), "until": until, "by": by, "principal": key, "endpoint": endpoint}
    given = {name: value for name, value in query.items() if value is not None}
    registry = control().registry
    if csv:
        registry.download(f"/v1/usage.csv?{urlencode(given)}", sys.stdout.buffer.write)
        sys.stdout.flush()
        return
    items = registry.items("/v1/usage", **given)
    heads = [column.strip() for column in by.split(",") if column.strip()]
    rows = [
        (
            *(item.get(f"{head}_name", item[head]) for head in heads),
            item["requests"],
            item["failed"],
            f"{item['compute_us'] / 1e6:.1f} s",
            output.size_of(item["received_bytes"]),
            output.size_of(item["sent_bytes"]),
            item["tokens_in"] or None,
            item["tokens_out"] or None,
        )
        for item in items
    ]
    columns = (*heads, "requests", "failed", "compute", "received", "sent", "tokens in", "tokens out")
    output.show({"items": items}, json, lambda: output.table(rows, columns, "No usage on these days."))


def day_of(text: str) -> str:
    """Parse a day: ``2026-01-31``, or ``7d`` for the first of the last seven days (UTC).

    Raise UsageError for other texts, and for less than a day.
    """
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        pass
    days = seconds(text) / _DAY_S
    if days < 1:
        raise UsageError(
            f"--since {text!r}: usage is stored per day. Write a date such as 2026-01-31, or days such as 7d."
        )
    return (datetime.now(timezone.utc).date() - timedelta(days=int(days) - 1)).isoformat()
