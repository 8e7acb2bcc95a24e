"""The command ``restart``."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Annotated

import typer

from tidegate.cli import output, source_checkout
from tidegate.cli.options import Json
from tidegate.cli.own_stack import StackFailed, own
from tidegate.cli.progress import Steps

if TYPE_CHECKING:
    from tidegate.stack.restarting import RestartProgress


def restart(
    services: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SERVICE...",
            help="registry, router, autoscaler, gateway; with the profile edge: control, gateway. "
            "Default: all.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Restart the services one after another, with the current settings. No inference request fails.

    The new gateway starts beside the old one. Then the old one ends its connections. Replicas, RabbitMQ and
    Valkey keep running. Example: tidegate settings set LOG_LEVEL=DEBUG, then tidegate restart gateway
    """
    source_checkout.require("restart")
    environ = dict(os.environ)  # Reading the settings adds paths of certificates, so copy it first.
    from tidegate.cli.settings import check_environment, check_file
    from tidegate.stack import StackError, restarting

    found, began = own(starting=False), time.monotonic()
    check_file(found)
    check_environment(found, environ)
    with Steps().shown() as steps:

        def on_progress(progress: RestartProgress) -> None:
            for name in progress.done:
                steps.change(name, "ready", "")
            if progress.finished:
                return
            for name in progress.services[len(progress.done) :][:1]:
                steps.change(name, "restarting", "")

        try:
            done = restarting.restart(found.state_path, services or (), environ, on_progress).done
        except StackError as error:
            raise StackFailed(str(error)) from None
    document = {"restarted": list(done), "seconds": round(time.monotonic() - began, 1)}
    output.show(document, json, lambda: output.line(f"restarted: {', '.join(done)}"))
