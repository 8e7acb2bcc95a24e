"""The stack itself: ``up``, ``down``, ``status``, ``settings``, ``version``."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit, urlunsplit

import typer

from tidegate.cli import checkout, exits
from tidegate.cli.options import Json
from tidegate.errors import TidegateError

if TYPE_CHECKING:
    from tidegate.settings import Settings
    from tidegate.stack import Progress

SERVICES = ("gateway", "registry", "router", "autoscaler")


class StackFailed(TidegateError):
    """The embedded stack did not start or stop; the message names the remedy."""

    reason = "stack"


def up(
    example: Annotated[
        bool, typer.Option("--example", help="Also train, deploy and call the digits example.")
    ] = False,
    json: Json = False,
) -> None:
    """Start the stack on this machine, or leave it alone where it runs; returns when it is ready."""
    checkout.require("up")
    from tidegate import stack
    from tidegate.cli import output
    from tidegate.cli.progress import Steps

    found, began = _own(starting=True), time.monotonic()
    running = stack.state(found).supervisor is not None
    if running:  # where it listens, not where a new one would
        found = _own(starting=False)
    else:
        _tell_forgotten(found)
    with Steps().shown() as steps:

        def on_progress(change: Progress) -> None:
            steps.change(change.name, change.state, change.detail)

        try:
            record = stack.up(found, on_progress)
        except stack.StackError as error:
            raise StackFailed(str(error)) from None
        shown = None
        if example:
            from tidegate.cli.example import Example

            # The token is there now.
            shown = Example(_own(starting=not running), steps).run()
    context = _register(found)
    document = {
        "urls": {name: getattr(found, f"{name}_url") for name in SERVICES},
        "grpc": found.gateway_grpc_target,
        "stack": record.as_dict(),
        "context": context,
        "example": shown.document() if shown else None,
        "seconds": time.monotonic() - began,
    }

    def human() -> None:
        if shown:
            shown.show()
        _show_urls(found, time.monotonic() - began)
        if context:
            output.line(f"Commands in any folder use this stack now (context {context}).")

    output.show(document, json, human)


def _own(*, starting: bool) -> Settings:
    """The settings of the stack of this machine: as a start makes them, or as the last start made them."""
    from tidegate import started
    from tidegate.cli import api, places

    state = places.find_own(
        api.chosen.get(), os.environ, Path.cwd(), places.read(), checkout.root(), starting=starting
    )
    fields: dict[str, Any] = {} if state is None else {"state_dir": state}
    if not starting:
        where = state or Path(os.environ.get("TIDEGATE_STATE_DIR") or places.STATE)
        address = started.read(where).address
        fields |= {k: v for k, v in address.items() if not os.environ.get(f"TIDEGATE_{k.upper()}")}
    return api.settings_with(fields)


def _tell_forgotten(found: Settings) -> None:
    """Say which settings the last start had from its environment, and this one does not have."""
    from tidegate import started
    from tidegate.cli.output import say

    lost = started.forgotten(started.read(found.state_path), os.environ, {})
    for name, value in lost.items():
        say(
            f"The last start had {name}={value} in its environment, this one does not. "
            f"To keep it: tidegate settings set {name}={value}",
            style="yellow",
        )


def _register(found: Settings) -> str | None:
    """Make the stack the user's current context; return its name, or None where that cannot be written."""
    from tidegate.cli import places
    from tidegate.cli.output import say

    try:
        return places.register(found.state_path, found.gateway_url)
    except TidegateError as error:
        say(f"{error.message} Commands find this stack only in its folder.", style="yellow")
        return None


def _show_urls(found: Settings, took_s: float) -> None:
    from tidegate.cli import output

    output.line()
    output.line(f"Tidegate is up after {took_s:.1f} s.", style="bold")
    for name in SERVICES:
        also = f", gRPC {found.gateway_grpc_target}" if name == "gateway" else ""
        output.line(f"  {name:<11} {getattr(found, f'{name}_url')}{also}")
    command = _typed()
    output.line(f"Your own model: {command} deploy FILE.onnx --name my-model. Stop it all: {command} down.")
    output.line("Next:")
    output.line(f"  {command} status")


def _typed() -> str:
    """How this command is typed in the shell it was started from: by its name only where that finds it."""
    ours = Path(sys.executable).with_name("tidegate")
    found = shutil.which("tidegate")
    if found is not None and Path(found).resolve() == ours.resolve():
        return "tidegate"
    here = Path.cwd()
    return str(ours.relative_to(here)) if ours.is_relative_to(here) else str(ours)


def down(json: Json = False) -> None:
    """Stop everything that belongs to the stack; the data stays."""
    checkout.require("down")
    from tidegate import stack
    from tidegate.cli import output
    from tidegate.cli.progress import Steps

    found = _own(starting=False)
    with Steps().shown() as steps:

        def on_progress(change: Progress) -> None:
            steps.change(change.name, change.state, change.detail)

        try:
            stopped = stack.down(found, on_progress)
        except stack.StackError as error:
            raise StackFailed(str(error)) from None
    told = "Tidegate is down; its data is kept." if stopped else "Nothing was running."
    output.show({"stopped": stopped}, json, lambda: output.line(told))


def status(json: Json = False) -> None:
    """Show services, endpoints and deployments; exits with 6 when a service does not answer.

    With a key that may not look at them it exits with 1, and says which scope is needed.
    """
    from tidegate.cli import output
    from tidegate.cli.health import Overview

    overview = Overview.look()
    output.show(overview.document(), json, overview.show)
    if not overview.complete:
        raise typer.Exit(exits.ERROR if overview.forbidden else exits.UNREACHABLE)


def settings_(json: Json = False) -> None:
    """List every setting: its environment variable, the value in force, and what it is."""
    from tidegate.cli import output
    from tidegate.cli.api import settings

    items = setting_items(settings())
    rows = [(item["name"], item["value"], item["source"], item["description"]) for item in items]
    output.show(
        {"items": items}, json, lambda: output.table(rows, ("setting", "value", "from", "what it is"))
    )


def setting_items(found: Settings) -> list[dict[str, Any]]:
    """The settings as ``TIDEGATE_*`` names and effective values, secrets masked."""
    values: dict[str, Any] = {
        **{name: getattr(found, name) for name in type(found).model_fields},
        "state_dir": found.state_path,
        "runtime_dir": found.runtime_path,
    }
    return [
        {
            "name": f"TIDEGATE_{name.upper()}",
            "value": masked(name, str(values[name])),
            "source": "environment" if os.environ.get(f"TIDEGATE_{name.upper()}") else "default",
            "description": field.description or "",
        }
        for name, field in type(found).model_fields.items()
    ]


def masked(name: str, value: str) -> str:
    """The value without secrets: tokens, and passwords within URLs."""
    if name.endswith(("token", "password", "secret", "key")):
        return "********" if value else ""
    if "://" not in value:
        return value
    parts = urlsplit(value)
    if parts.password is None:
        return value
    user, _, host = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{user.partition(':')[0]}:********@{host}"))


def version(json: Json = False) -> None:
    """Show the version of Tidegate and of Python."""
    from tidegate import __version__
    from tidegate.cli import output

    document = {"tidegate": __version__, "python": platform.python_version()}
    output.show(document, json, lambda: output.line(f"tidegate {__version__} (Python {document['python']})"))
