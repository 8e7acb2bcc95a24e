"""``tidegate ledger`` counts jobs; ``tidegate webhook-secret`` shows the secret that signs webhooks."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tidegate.cli import exit_codes, output
from tidegate.cli.api import control
from tidegate.cli.options import Json

Of = Annotated[
    str,
    typer.Option(
        "--principal", help="The id of an API key, or `anonymous` for callers on this machine without a key."
    ),
]


def ledger(json: Json = False) -> None:
    """Count jobs, and find lost ones. Exit code 1: a job is lost; 6: the count is incomplete."""
    found = control().router.get("/v1/ledger")
    output.show(found, json, lambda: _show(found))
    if found["unaccounted"]:
        raise typer.Exit(exit_codes.ERROR)
    if found["unaccounted"] is None:
        raise typer.Exit(exit_codes.UNREACHABLE)


def _show(found: dict[str, Any]) -> None:
    unaccounted = found["unaccounted"]
    if unaccounted is None:
        output.line("unaccounted  unknown", style="yellow")
        for source, why in found["away"].items():
            output.say(f"{source}: {why}", style="yellow")
        return
    output.line(f"unaccounted  {unaccounted}", style="red" if unaccounted else "green")
    output.line()
    rows = [("confirmed to clients (202)", found["acknowledged"]), ("accepted", found["accepted"])]
    rows += [(f"- {state}", count) for state, count in found["over"].items()]
    rows += [(f"- {state}", count) for state, count in found["unfinished"].items()]
    messages = found["messages"]
    rows += [
        ("messages in the broker", messages["ready"]),
        ("messages at workers", messages["held"]),
        ("jobs unconfirmed, or leased by a worker", messages["watched"]),
        ("records kept", found["kept"]),
        ("records removed", found["removed"]),
    ]
    output.table(rows, ("jobs", "count"))
    for what, count in found["missing"].items():
        if count:
            output.say(f"missing in the last count: {count} {what}", style="yellow")


def webhook_secret(of: Of = "anonymous", json: Json = False) -> None:
    """Print the secret that signs webhooks.

    Any Standard Webhooks library can verify webhooks with this secret.
    """
    found = control().router.get("/v1/webhooks/secret", principal=of)
    output.show(found, json, lambda: output.line(found["secret"]))
