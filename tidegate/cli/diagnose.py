"""``tidegate diagnose``: what is wrong with endpoints, why, and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from tidegate.cli import output
from tidegate.cli.api import control
from tidegate.cli.options import Json, seconds


def diagnose(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One endpoint; default: all.")] = None,
    window: Annotated[str, typer.Option(metavar="TIME", help="The recent period to examine.")] = "15m",
    past: Annotated[str, typer.Option(metavar="TIME", help="The earlier period to compare with.")] = "1d",
    days: Annotated[
        int, typer.Option(min=1, max=14, help="Number of recent full days to compare with earlier days.")
    ] = 7,
    json: Json = False,
) -> None:
    """Find problems: slow answers, falling adoption, high cost, inconsistent times, errors under load.

    Each finding has evidence, and a command as its remedy. Example: tidegate diagnose digits --window 5m
    """
    found = control().router.get(
        "/v1/diagnosis", name=name, window_s=seconds(window), past_s=seconds(past), recent_days=days
    )
    output.show(found, json, lambda: _tell(found))


def _tell(found: Mapping[str, Any]) -> None:
    for item in found["items"]:
        output.line(f"{item['endpoint']}: {item['title']} ({item['cause']})", style="bold red")
        for sentence in item["evidence"]:
            output.line(f"  {sentence}")
        output.line(f"  {item['remedy']['why']}")
        output.line(f"  next: {item['remedy']['command']}", style="bold")
    for state in found["endpoints"]:
        if state["state"] != "found":
            reason = f": {state['reason']}" if state["reason"] else ""
            output.line(f"{state['endpoint']}: {_WORDS[state['state']]}{reason}")
    if not found["endpoints"]:
        output.say("No endpoint exists. Deploy a model: tidegate deploy FILE")


_WORDS = {"healthy": "no symptom", "learning": "no verdict yet", "idle": "too quiet"}
