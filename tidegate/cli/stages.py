"""``stages`` sets the stages of a model, ``stage`` moves a version, and ``approve`` approves a version."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tidegate.cli import output
from tidegate.cli.api import Doc, control, part
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.options import Json, Model, Reference

_FILE = "stages: [{name: staging}, {name: production, approvals: 2, verified: true}], serve_from: production"


def stages(
    name: Model,
    set_: Annotated[
        Path | None,
        typer.Option(
            "--set", metavar="FILE.yaml", help="Set the stages and `serve_from` (docs/catalogue.md)."
        ),
    ] = None,
    off: Annotated[
        bool, typer.Option("--off", help="Remove the stages, so that any version may serve.")
    ] = False,
    json: Json = False,
) -> None:
    """Show or set the stages of a model, and the requirements of each stage.

    To set stages, your key needs the scope `admin`. Example: `tidegate stages digits --set stages.yaml`
    """
    from tidegate.cli.metadata_options import read_metadata

    if set_ is not None and off:
        raise UsageError("Use --set or --off, not both.")
    path = f"/v1/models/{part(name)}/policy"
    patch: dict[str, Any] | None = {"stages": None, "serve_from": None} if off else None
    if set_ is not None:
        patch = {"serve_from": None, **read_metadata(set_)}
        if "stages" not in patch or set(patch) - {"stages", "serve_from"}:
            raise UsageError(
                f"{set_} needs `stages`, can have `serve_from`, and must have nothing else. Example: {_FILE}"
            )
    registry = control().registry
    policy = registry.get(path) if patch is None else registry.patch(path, patch)
    rows = [
        (
            stage["name"],
            stage["approvals"] or None,
            stage["scope"] if stage["approvals"] else None,
            stage["verified"],
            stage["checks"],
            "from here on" if stage["name"] == policy["serve_from"] else None,
        )
        for stage in policy["stages"]
    ]
    columns = ("stage", "approvals", "scope", "verified", "checks", "serves")
    empty = (
        f"{name} has no stages, so any version may serve. Set them: tidegate stages {name} --set FILE.yaml"
    )
    shown = {key: policy[key] for key in ("stages", "serve_from")}
    output.show(shown, json, lambda: output.table(rows, columns, empty))


def stage(
    version: Reference,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="STAGE", help=("Move the version to this stage; `none`: to no stage.")),
    ] = None,
    json: Json = False,
) -> None:
    """Show the stage of a version and what the next stage requires, or move the version.

    Example: `tidegate stage digits@3 --to production`
    """
    from tidegate.cli.catalogue import path_of, version_of

    registry = control()
    found = version_of(registry, version)
    path = f"{path_of(found)}/stage"
    view = registry.registry.get(path) if to is None else registry.registry.put(path, {"stage": to})
    _show(found, view, json)


def approve(
    version: Reference,
    stage: Annotated[
        str, typer.Option("--stage", metavar="STAGE", help=("The stage that the version may enter."))
    ],
    comment: Annotated[str, typer.Option(help="A note with the reason, for other people.")] = "",
    withdraw: Annotated[bool, typer.Option("--withdraw", help="Withdraw your approval.")] = False,
    json: Json = False,
) -> None:
    """Approve a version for a stage, with your key: `tidegate approve digits@3 --stage production`."""
    from tidegate.cli.catalogue import path_of, version_of

    plane = control()
    found = version_of(plane, version)
    path = f"{path_of(found)}/approvals"
    if withdraw:
        plane.registry.delete(f"{path}/{part(stage)}")
        view = plane.registry.get(f"{path_of(found)}/stage")
    else:
        view = plane.registry.post(path, {"stage": stage, "comment": comment})
    _show(found, view, json)


def _show(version: Doc, view: Doc, json: bool) -> None:
    def human() -> None:
        named = f"{version['model']}@{version['number']}"
        output.line(
            f"{named} is in the stage {view['stage']}." if view["stage"] else f"{named} has no stage."
        )
        rows = [
            (each["stage"], each["by"], output.moment(each["at"]), each["comment"])
            for each in view["approvals"]
        ]
        if rows:
            output.table(rows, ("approved for", "by", "when", "comment"))
        for lack in view["missing"]:
            output.line(f"For {view['next']}: {lack}.")
        if view["next"] and not view["missing"]:
            output.line(
                f"The next stage is {view['next']}. "
                f"To move the version: tidegate stage {named} --to {view['next']}"
            )

    output.show(view, json, human)
