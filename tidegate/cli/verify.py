"""``tidegate verify``: verify a version in a scratch replica, and measure its capacity."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tidegate.cli import output
from tidegate.cli.api import control, part
from tidegate.cli.options import Json, Model, seconds
from tidegate.cli.progress import Steps


def verify(
    name: Model,
    version: Annotated[
        int | None, typer.Option("--version", metavar="N", min=1, help="The version; default: the latest.")
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="Sample requests with expected answers; default: those of the last verification.",
        ),
    ] = None,
    timeout: Annotated[str, typer.Option(metavar="TIME", help="How long to wait.")] = "5m",
    json: Json = False,
) -> None:
    """Verify a version in a scratch replica, and measure its capacity. Other replicas are not affected.

    Examples: `tidegate verify digits`, `tidegate verify digits --version 2 --check sample.json`.
    """
    from tidegate.cli.smoke import samples_of
    from tidegate.cli.verification import again, card_lines, state_words, wait_verified

    plane = control()
    number = version or plane.registry.get(f"/v1/models/{part(name)}")["latest"]["number"]
    found = plane.registry.get(f"/v1/models/{part(name)}/versions/{number}")
    with Steps().shown() as steps:
        found = again(plane, found, {}, samples_of(check) if check else [])
        found = wait_verified(plane, found, seconds(timeout), steps)
    verification = found["verification"]
    document = {"model": name, "version": number, **verification}

    def human() -> None:
        output.line(f"{name} version {number} is {state_words(verification)}")
        for row in card_lines(verification.get("card")):
            output.line(f"  {row}")

    output.show(document, json, human)
