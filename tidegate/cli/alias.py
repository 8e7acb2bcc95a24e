"""``tidegate alias``: names such as ``champion`` that point to one version of a model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tidegate.cli import output
from tidegate.cli.api import control, part
from tidegate.cli.options import Json, Model

alias = typer.Typer(
    name="alias",
    help="Names such as `champion` that point to one version of a model. Use them as NAME@champion.",
    no_args_is_help=True,
)

Alias = Annotated[str, typer.Argument(metavar="ALIAS", help="The alias, such as champion.")]


@alias.command("list")
def listed(name: Model, json: Json = False) -> None:
    """List the aliases of a model."""
    items = control().registry.items(f"/v1/models/{part(name)}/aliases")
    rows = [(item["alias"], item["version"]) for item in items]
    empty = f"{name} has no alias. Set one: tidegate alias set {name} champion N"
    output.show({"items": items}, json, lambda: output.table(rows, ("alias", "version"), empty))


@alias.command("set")
def set_(
    name: Model,
    alias: Alias,
    version: Annotated[str, typer.Argument(metavar="N", help="A version, another alias or `latest`.")],
    expected: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help=("Change the alias only if it points to this version now; 0: only if it does not exist."),
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Point an alias to a version immediately. Example: `tidegate alias set digits champion 3`"""
    plane = control()
    number = plane.registry.get(f"/v1/models/{part(name)}/versions/{part(version)}")["number"]
    body: dict[str, Any] = {"version": number}
    if expected is not None:
        body["expected"] = expected
    found = plane.registry.put(f"/v1/models/{part(name)}/aliases/{part(alias)}", body)
    output.show(found, json, lambda: output.line(f"{name}@{alias} is version {number} now."))


@alias.command()
def history(name: Model, alias: Alias, json: Json = False) -> None:
    """List the changes of an alias, newest first, each with its time, principal, old and new version."""
    found = control().registry.get(f"/v1/models/{part(name)}/aliases/{part(alias)}")
    rows = [
        (output.moment(move["at"]), move["by"], move["from_version"], move["to_version"])
        for move in found["moves"]
    ]
    output.show(found, json, lambda: output.table(rows, ("when", "who", "from", "to")))


@alias.command()
def delete(name: Model, alias: Alias, json: Json = False) -> None:
    """Delete an alias. Its version stays."""
    control().registry.delete(f"/v1/models/{part(name)}/aliases/{part(alias)}")
    output.show({"deleted": alias}, json, lambda: output.line(f"deleted: {name}@{alias}"))
