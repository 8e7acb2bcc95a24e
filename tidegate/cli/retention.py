"""Restore deleted versions (``undelete``), and limit the versions that a model keeps (``retention``)."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tidegate.cli import output
from tidegate.cli.api import control, part
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.options import Json, Model, seconds

_DAY_S = 86_400.0


def undelete(
    version: Annotated[
        str,
        typer.Argument(
            metavar="NAME[@N]", help="NAME@N: one deleted version; NAME: all deleted versions of a model."
        ),
    ],
    json: Json = False,
) -> None:
    """Restore a deleted version, or all deleted versions of a model: `tidegate undelete digits@3`.

    `tidegate versions NAME --deleted` lists the deleted versions. Deployments and endpoints stay deleted.
    """
    name, at, number = version.partition("@")
    if at and not number.isdecimal():
        raise UsageError(f"{version}: write the number of the deleted version, such as {name}@3.")
    path = f"/v1/models/{part(name)}" + (f"/versions/{number}" if at else "")
    found = control().registry.post(f"{path}/restore", {})
    numbers = ", ".join(map(str, found["versions"]))
    said = f"restored: {name} version {numbers}. To serve one: tidegate deploy {name}@{found['versions'][-1]}"
    output.show(found, json, lambda: output.line(said))


def retention(
    name: Model,
    keep_last: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Always keep the newest N versions.")
    ] = None,
    max_age: Annotated[
        str | None, typer.Option(metavar="TIME", help="Delete only versions older than this, such as 90d.")
    ] = None,
    sleeping: Annotated[
        bool | None,
        typer.Option(
            "--sleeping/--no-sleeping",
            help="Also delete a version with a sleeping deployment, if no endpoint names that deployment.",
        ),
    ] = None,
    off: Annotated[bool, typer.Option("--off", help="Keep every version.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Change nothing; show what would be deleted now.")
    ] = False,
    now: Annotated[bool, typer.Option("--now", help="Delete now, instead of within ten minutes.")] = False,
    json: Json = False,
) -> None:
    """Show or set how many versions of a model are kept. List the versions to keep and to delete.

    Some versions are always kept: the latest version, versions in use or with an alias, and the target of a
    rollback.

    Example: `tidegate retention digits --keep-last 10 --max-age 90d --dry-run`
    """
    patch = _patch(keep_last, max_age, sleeping, off=off)
    if dry_run and now:
        raise UsageError("Use --dry-run or --now, not both.")
    registry, path = control().registry, f"/v1/models/{part(name)}"
    if patch is not None and not dry_run:
        registry.patch(f"{path}/policy", {"retention": patch})
    policy = registry.get(f"{path}/policy")["retention"]
    if patch is not None and dry_run:
        policy = {} if patch == {} else {**policy, **patch}
        found = registry.post(f"{path}/retention?dry_run=true", {"retention": policy})
    else:
        found = registry.post(f"{path}/retention" + ("" if now else "?dry_run=true"), {})
    document = {"retention": policy, **found}
    rows = [(f["version"], "delete" if f["delete"] else "keep", f["reason"]) for f in found["items"]]

    def human() -> None:
        output.line(_shown(policy))
        output.table(rows, ("version", "fate", "why"))

    output.show(document, json, human)


def _patch(
    keep_last: int | None, max_age: str | None, sleeping: bool | None, *, off: bool
) -> dict[str, Any] | None:
    """Return the retention fields to change; None if no option changes the retention.

    Raise UsageError for --off with another option.
    """
    named = {
        "keep_last": keep_last,
        "max_age_days": None if max_age is None else seconds(max_age) / _DAY_S,
        "sleeping": sleeping,
    }
    given = {key: value for key, value in named.items() if value is not None}
    if off and given:
        raise UsageError("--off keeps every version. Leave out --keep-last, --max-age and --sleeping.")
    return {"keep_last": None, "max_age_days": None, "sleeping": None} if off else given or None


def _shown(policy: dict[str, Any]) -> str:
    keep, days = policy.get("keep_last"), policy.get("max_age_days")
    if keep is None and days is None:
        return "Every version is kept, because the model has no retention."
    parts = [f"the newest {keep} versions"] if keep is not None else []
    parts += [f"versions of the last {days:g} days"] if days is not None else []
    return f"Kept: {' and '.join(parts)}, and versions in use."
