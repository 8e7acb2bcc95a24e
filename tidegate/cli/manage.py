"""Commands that change what runs: ``scale``, ``apply``, ``delete``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from json import dumps
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

import typer

from tidegate.cli import output
from tidegate.cli.api import Control, control, part
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.options import Json, Name, seconds
from tidegate.cli.progress import Steps
from tidegate.kernel.errors import BadRequest, Conflict, NotFound

VERIFICATION_S = 300.0  # the longest wait for the verification of a version


def scale(
    name: Name,
    replicas: Annotated[int | None, typer.Argument(metavar="N", min=0, help="How many replicas.")] = None,
    auto: Annotated[bool, typer.Option("--auto", help="Let the autoscaler decide again.")] = False,
    ttl: Annotated[
        str | None,
        typer.Option(
            "--for",
            "--ttl",
            metavar="TIME",
            help="Time to hold the number, such as 2h; default: until --auto.",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Allow more than max_replicas, if the host has room.")
    ] = False,
    json: Json = False,
) -> None:
    """Hold a deployment at N replicas, whatever its load. With --auto, scale it by its load again."""
    if (replicas is None) == (not auto):
        raise UsageError("Give either a number of replicas or --auto.")
    if auto and (ttl or force):
        raise UsageError("--for and --force need a number of replicas. Write tidegate scale NAME N")
    plane = control()
    deployment = plane.deployment_of(name)
    path = f"/v1/deployments/{part(deployment)}/replicas"
    body: dict[str, Any] = {"replicas": replicas}
    if ttl:
        body["ttl_s"] = seconds(ttl)
    if force:
        body["force"] = True
    answer = plane.autoscaler.delete(path) if auto else plane.autoscaler.put(path, body)
    until = f" for {ttl}" if ttl else ""
    told = "scales by its load again" if auto else f"is held at {replicas} replicas{until}"
    if replicas is not None and (runs := answer.get("runs")) is not None and runs < replicas:
        told = f"is held at {runs} replicas{until}, not at {replicas}: {answer['reason']}."
        told += _way_out(name, replicas, answer.get("bounded_by"))
    document = {"deployment": deployment, "replicas": replicas, "auto": auto, "answer": answer}
    output.show(document, json, lambda: output.line(f"{deployment} {told}"))


def _way_out(name: str, replicas: int, bounded_by: str | None) -> str:
    """Return a text with the commands that allow more replicas; empty if no command would help."""
    if bounded_by in (None, "host"):
        return ""
    raised = f"`tidegate policy {name} --set max_replicas={replicas}` raises the maximum; "
    forced = f"`tidegate scale {name} {replicas} --force` exceeds the limit."
    return f" {raised if bounded_by == 'maximum' else ''}{forced}"


def apply(
    file: Annotated[Path, typer.Option("--file", "-f", metavar="FILE.yaml", help="- reads stdin.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the file and show what would change. Change nothing.")
    ] = False,
    prune: Annotated[
        bool,
        typer.Option(
            "--prune", help="Also delete all Deployments and Endpoints that the file does not name."
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before --prune deletes.")] = False,
    json: Json = False,
) -> None:
    """Create or change Deployments, Endpoints and models from a YAML file. On any error, change nothing.

    Example: tidegate export digits > state.yaml, edit it, tidegate apply -f state.yaml
    """
    if prune and str(file) == "-" and not (yes or dry_run):
        raise UsageError("--prune asks before it deletes, but stdin is the file. Add --yes or --dry-run.")
    stated, plane = documents(_read(file), str(file)), control()
    body: dict[str, Any] = {**stated, "prune": True} if prune else {**stated}
    _wait_for_verifications(plane, stated["deployments"])
    if prune and not (yes or dry_run):
        body["deletions"] = _confirmed(plane.registry.post("/v1/apply/dry-run", body)["items"])
    applied = plane.registry.post("/v1/apply/dry-run" if dry_run else "/v1/apply", body)
    output.show(applied, json, lambda: _show_applied(applied["items"], dry_run=dry_run))


def _confirmed(planned: list[dict[str, Any]]) -> list[str]:
    """Ask before objects are deleted, and return them. The registry then deletes no other ones."""
    deleted = [f"{item['kind']} {item['name']}" for item in planned if item["action"] == "deleted"]
    if deleted:
        confirm(f"This deletes {', '.join(deleted)}")
    return deleted


def _show_applied(items: list[dict[str, Any]], *, dry_run: bool) -> None:
    output.table([(item["kind"], item["name"], item["action"]) for item in items], ("kind", "name", "action"))
    for item in items:
        if item.get("reason"):
            output.line(f"{item['kind']} {item['name']}: {item['action']}: {item['reason']}")
        for change in item.get("changes", ()):  # an older registry sends none
            values = " -> ".join(_in_short(change[when]) for when in ("before", "after"))
            output.line(f"{item['kind']} {item['name']}: {change['field']}: {values}")
    if dry_run:
        output.say("This was a dry run: nothing was changed.")


def _in_short(value: Any) -> str:
    return "none" if value is None else dumps(value)


def _wait_for_verifications(plane: Control, deployments: list[dict[str, Any]]) -> None:
    """Wait until the pending verifications of the Deployments' versions have ended.

    Skip wrong documents here: the registry reports their errors later.
    """
    from tidegate.cli.verification import wait_verified

    with Steps().shown() as steps:
        for each in deployments:
            model, number = each.get("model"), each.get("version")
            if each.get("unverified") or not isinstance(model, str) or not isinstance(number, int):
                continue
            try:
                version = plane.registry.get(f"/v1/models/{part(model)}/versions/{number}")
            except (NotFound, BadRequest):
                continue
            if (version.get("verification") or {}).get("state") == "pending":
                wait_verified(plane, version, VERIFICATION_S, steps)


def _read(file: Path) -> str:
    try:
        return sys.stdin.read() if str(file) == "-" else file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: {getattr(error, 'strerror', None) or 'it is not text'}.") from None


def documents(text: str, where: str) -> dict[str, list[dict[str, Any]]]:
    """Return the documents of a YAML file by kind. Raise UsageError for a wrong document."""
    import yaml

    try:
        found = [document for document in yaml.safe_load_all(text) if document is not None]
    except yaml.YAMLError as error:
        raise UsageError(f"{where} is not YAML: {error}") from None
    sorted_: dict[str, list[dict[str, Any]]] = {"deployments": [], "endpoints": []}
    kinds = ("models", *sorted_)
    for number, document in enumerate(found, start=1):
        kind = str(document.get("kind")) if isinstance(document, dict) else ""
        if f"{kind.lower()}s" not in kinds:
            raise UsageError(
                f"{where}, document {number}: needs `kind: Deployment`, `kind: Endpoint` or `kind: Model`, "
                f"has {kind or 'none'!r}."
            )
        fields = {key: value for key, value in document.items() if key != "kind"}
        sorted_.setdefault(f"{kind.lower()}s", []).append(fields)
    if not found:
        raise UsageError(f"{where} holds no document.")
    return sorted_


def delete(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="A model (deleted with its endpoint and deployments), or an endpoint."
        ),
    ],
    version: Annotated[
        int | None, typer.Option(metavar="N", help="Only this version, with its deployments.")
    ] = None,
    deployment: Annotated[
        bool, typer.Option("--deployment", help="NAME is a deployment: delete only the deployment.")
    ] = False,
    endpoint: Annotated[
        bool, typer.Option("--endpoint", help=("NAME is an endpoint: delete only the endpoint."))
    ] = False,
    permanent: Annotated[
        bool, typer.Option("--permanent", help="Delete versions permanently: `undelete` cannot restore them.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    json: Json = False,
) -> None:
    """Delete a model with its endpoint and deployments, or only one version, deployment or endpoint.

    For TIDEGATE_DELETED_VERSION_S seconds, `tidegate undelete` can restore a deleted version.
    """
    if deployment + endpoint + (version is not None) > 1:
        raise UsageError("--version, --deployment and --endpoint exclude each other.")
    plane = control()
    if deployment or endpoint:
        removals = [_one(plane, "deployment" if deployment else "endpoint", name)]
    elif version is not None:
        removals = _version(plane, name, version)
    else:
        removals = [_everything(plane, name)]
    named = [removal.shown for removal in removals]
    if not yes:
        confirm(f"This deletes {', '.join(named)}")
    for removal in removals:
        query = dict(removal.query)
        if permanent and removal.path.startswith("/v1/models/"):
            query["permanent"] = "true"
        plane.registry.delete(removal.path, **query)
    output.show({"deleted": named}, json, lambda: output.line(f"deleted: {', '.join(named)}"))


class Removal(NamedTuple):
    """An object to delete: its name in messages, and the request that deletes it."""

    shown: str
    path: str
    query: Mapping[str, str] = MappingProxyType({})


def _one(plane: Control, kind: str, name: str) -> Removal:
    path = f"/v1/{kind}s/{part(name)}"
    plane.registry.get(path)
    return Removal(f"{kind} {name}", path)


def _version(plane: Control, model: str, number: int) -> list[Removal]:
    path = f"/v1/models/{part(model)}/versions/{number}"
    found = plane.registry.get(path)
    if named := found.get("aliases"):
        raise Conflict(
            f"Version {number} of {model} has the alias {', '.join(named)}, so nothing was deleted. Move it "
            f"first: tidegate alias set {model} {named[0]} N"
        )
    held = plane.registry.pages("/v1/deployments", model=model)
    gone = [deployment["name"] for deployment in held if deployment["version"] == number]
    removals = [Removal(f"deployment {name}", f"/v1/deployments/{part(name)}") for name in gone]
    return [*removals, Removal(f"{model} version {number}", path)]


def _everything(plane: Control, name: str) -> Removal:
    try:
        plane.registry.get(f"/v1/models/{part(name)}")
    except NotFound:
        try:
            return _one(plane, "endpoint", name)
        except NotFound:
            raise NotFound(
                f"There is neither a model nor an endpoint {name!r}. `tidegate status` lists them."
            ) from None
    held = [deployment["name"] for deployment in plane.registry.pages("/v1/deployments", model=name)]
    shown = f"model {name} with {', '.join(held)}" if held else f"model {name}"
    return Removal(shown, f"/v1/models/{part(name)}", {"cascade": "true"})


def confirm(warning: str) -> None:
    """Ask the user to confirm an action. If the answer is not yes, end the command.

    ``warning``: what the action does. Raise UsageError if there is no terminal.
    """
    if not sys.stdin.isatty():
        raise UsageError(f"{warning}. To confirm without a terminal, repeat the command with --yes.")
    if not typer.confirm(f"{warning}. Go on?", err=True):
        raise typer.Exit(1)
