"""Commands for the stack: ``up``, ``down``, ``status``, ``version``."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tidegate.cli import edge_profile, exit_codes, monitoring, output, source_checkout
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.options import Json
from tidegate.cli.output import say
from tidegate.cli.own_stack import StackFailed, own
from tidegate.cli.progress import Steps
from tidegate.client import contexts
from tidegate.kernel.errors import TidegateError
from tidegate.version import VERSION

if TYPE_CHECKING:
    from tidegate.kernel.settings.base import Settings
    from tidegate.stack import Progress
    from tidegate.stack.record import StackRecord

SERVICES = ("gateway", "registry", "router", "autoscaler")


def up(
    example: Annotated[
        bool, typer.Option("--example", help="Also train, deploy and call the digits example.")
    ] = False,
    llm: Annotated[
        bool,
        typer.Option(
            "--llm", help="Also fetch and deploy SmolLM2, a small language model, and send it a question."
        ),
    ] = False,
    with_monitoring: Annotated[
        bool,
        typer.Option(
            "--with-monitoring",
            help="Also run Prometheus. If it is missing, install the system's package (332 MB).",
        ),
    ] = False,
    profile: Annotated[
        str | None,
        typer.Option(help="edge: for one core and 1 GB. Later starts keep the profile; `default` ends it."),
    ] = None,
    json: Json = False,
) -> None:
    """Start the stack on this machine and wait until it is ready. A running stack is left as it is.

    If Prometheus is installed, the stack also starts it. TIDEGATE_MONITORING=off prevents this. Examples:
    tidegate up --with-monitoring, tidegate up --profile edge
    """
    source_checkout.require("up")
    from tidegate import stack
    from tidegate.cli.settings import check_file
    from tidegate.cli.stack_memory import memory_of, show_memory

    found, began = own(starting=True), time.monotonic()
    running = stack.state(found).supervisor is not None
    found = _with_options(found, profile, with_monitoring, stack.state(found))
    if running:  # use the addresses of the running stack, not those of a new one
        found = own(starting=False)
    else:
        check_file(found)
        _tell_misspelled()
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

            # Read the settings again, because the stack creates the service token at its start.
            shown = Example(own(starting=not running), steps).run()
        talk = None
        if llm:
            from tidegate.cli.llm_example import LlmExample

            talk = LlmExample(own(starting=not running), steps)
            talk.deploy()
    asked = talk.ask(quiet=json) if talk else None
    context = _register(found)
    memory = memory_of(found, record)
    document = {
        "urls": {name: getattr(found, f"{name}_url") for name in SERVICES},
        "grpc": found.gateway_grpc_target,
        "prometheus": monitoring.url(record),
        "stack": record.as_dict(),
        "context": context,
        "example": shown.document() if shown else None,
        "llm": asked.document() if asked else None,
        "profile": found.profile,
        "memory": memory,
        "seconds": time.monotonic() - began,
    }

    def human() -> None:
        if shown:
            shown.show()
        if asked:
            asked.show()
        _show_urls(found, monitoring.url(record), time.monotonic() - began)
        if found.profile == "edge":
            show_memory(memory)
        if context:
            output.line(f"Commands in any folder use this stack now (context {context}).")

    output.show(document, json, human)


def _with_options(
    found: Settings, profile: str | None, with_monitoring: bool, record: StackRecord
) -> Settings:
    """Return the settings to start the stack with these options.

    Raise UsageError for options that exclude each other, StackFailed if an option cannot be applied.
    """
    if profile is not None:
        found = edge_profile.chosen(found, profile, record)
    if not with_monitoring:
        return found
    if found.profile == "edge":
        raise UsageError(
            "The edge profile has no monitoring. Leave out --with-monitoring, or use --profile default."
        )
    return monitoring.enabled(found, record)


def _tell_misspelled() -> None:
    """Warn about environment variables that look like a misspelled setting."""
    from deploy.settings_check import misspelled

    for name, meant in misspelled(os.environ).items():
        say(f"{name} is not a setting, so it changes nothing. Did you mean {meant}?", style="yellow")


def _tell_forgotten(found: Settings) -> None:
    """Warn about settings that the last start had in its environment and this start lacks."""
    from deploy.settings_check import names
    from tidegate.client import started

    lost = started.forgotten(started.read(found.state_path), os.environ, found.file_values)
    for name in lost.keys() & names().keys():
        value = lost[name]
        say(
            f"The last start had {name}={value} in its environment, but this start does not. "
            f"To keep the setting: tidegate settings set {name}={value}",
            style="yellow",
        )


def _register(found: Settings) -> str | None:
    """Make the stack the user's current context.

    Return the name of the context, or None if the context cannot be stored.
    """
    try:
        return contexts.register(found.state_path, found.gateway_url)
    except TidegateError as error:
        say(f"{error.message} Commands find this stack only if you run them in its folder.", style="yellow")
        return None


def _show_urls(found: Settings, prometheus: str | None, took_s: float) -> None:
    output.line()
    output.line(f"Tidegate is up after {took_s:.1f} s.", style="bold")
    for name in SERVICES:
        also = f", gRPC {found.gateway_grpc_target}" if name == "gateway" else ""
        output.line(f"  {name:<11} {getattr(found, f'{name}_url')}{also}")
    if prometheus:
        output.line(
            f"  {'prometheus':<11} {prometheus} (user metrics, password in {found.state_path}/metrics/token)"
        )
    command = _typed()
    output.line(f"Your own model: {command} deploy FILE.onnx --name my-model. Stop it all: {command} down.")
    output.line("Next:")
    output.line(f"  {command} status")


def _typed() -> str:
    """Return ``tidegate`` if this shell finds the command by this name, else the command's path."""
    ours = Path(sys.executable).with_name("tidegate")
    found = shutil.which("tidegate")
    if found is not None and Path(found).resolve() == ours.resolve():
        return "tidegate"
    here = Path.cwd()
    return str(ours.relative_to(here)) if ours.is_relative_to(here) else str(ours)


def down(json: Json = False) -> None:
    """Stop all processes of the stack. The data stays."""
    source_checkout.require("down")
    from tidegate import stack

    found = own(starting=False)
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
    """Show services, endpoints and deployments. Exit code 6: a service does not answer.

    Exit code 1: the key lacks a scope, which the message names.
    """
    from tidegate.cli.health import Overview

    overview = Overview.look()
    output.show(overview.document(), json, overview.show)
    if not overview.complete:
        raise typer.Exit(exit_codes.ERROR if overview.forbidden else exit_codes.UNREACHABLE)


def version(json: Json = False) -> None:
    """Show the version of Tidegate and of Python."""
    document = {"tidegate": VERSION, "python": platform.python_version()}
    output.show(document, json, lambda: output.line(f"tidegate {VERSION} (Python {document['python']})"))
