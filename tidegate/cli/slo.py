"""``tidegate slo``: the objectives of endpoints, and their remaining error budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from tidegate.cli import output
from tidegate.cli.api import control, part
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.options import Json
from tidegate.kernel.errors import NotFound


def slo(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="One endpoint; default: all endpoints with objectives."),
    ] = None,
    availability: Annotated[
        float | None, typer.Option(metavar="PERCENT", help="Percentage of requests that must not fail.")
    ] = None,
    latency_ms: Annotated[
        float | None, typer.Option(metavar="MS", help="Longest time for an answer, in milliseconds.")
    ] = None,
    latency_target: Annotated[
        float | None,
        typer.Option(
            metavar="PERCENT", help="Percentage of answers that must take at most --latency-ms. [99]"
        ),
    ] = None,
    window: Annotated[
        str | None, typer.Option(metavar="DAYS", help="Time over which the objectives are measured. [30d]")
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the objectives.")] = False,
    json: Json = False,
) -> None:
    """Show the remaining error budgets, or set objectives. An alert fires if a budget burns too fast.

    Example: tidegate slo digits --availability 99.9 --latency-ms 200
    """
    given = {
        "availability": availability,
        "latency_ms": latency_ms,
        "latency_target": latency_target,
        "window": window,
    }
    changes = {key: value for key, value in given.items() if value is not None}
    plane = control()
    if changes or remove:
        if name is None or (changes and remove):
            raise UsageError("Name one endpoint, and either set objectives or remove them.")
        path = f"/v1/endpoints/{part(name)}"
        endpoint = plane.registry.revise(
            path, lambda stored: {"slo": None if remove else {**(stored.get("slo") or {}), **changes}}
        )
        document = {"endpoint": name, "slo": endpoint["slo"]}
        output.show(document, json, lambda: output.line(f"{name}: {_objectives(document['slo'])}"))
        return
    items = plane.router.items("/v1/slo")
    if name is not None:
        items = [each for each in items if each["endpoint"] == name]
        if not items:
            raise NotFound(f"{name} has no objectives. Set them: tidegate slo {name} --availability 99.9")
    output.show({"items": items}, json, lambda: _print(items))


def _objectives(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "no objectives"
    parts = []
    if found["availability"] is not None:
        parts.append(f"{found['availability']:g}% of requests do not fail")
    if found["latency_ms"] is not None:
        parts.append(f"{found['latency_target']:g}% take at most {found['latency_ms']:g} ms")
    return f"{', '.join(parts)}, over {found['window']}"


def _print(items: Sequence[Mapping[str, Any]]) -> None:
    rows = [
        (
            item["endpoint"],
            item["objective"],
            f"{item['target']:g}%",
            None if item["attained"] is None else f"{item['attained']:.3f}%",
            item["requests"],
            item["bad"],
            None if item["left"] is None else f"{item['left']:.1%}",
            *(None if rate is None else f"{rate:.2f}" for rate in item["burn"].values()),
        )
        for item in items
    ]
    heads = ("endpoint", "objective", "target", "attained", "requests", "bad", "budget left")
    burns = tuple(f"burn {name}" for name in items[0]["burn"]) if items else ()
    hint = "No endpoint has objectives. Set them: tidegate slo NAME --availability 99.9"
    output.table(rows, (*heads, *burns), hint)
