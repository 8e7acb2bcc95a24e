"""``tidegate export``: the Deployments and Endpoints, as a file that ``tidegate apply`` accepts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Annotated, Any

import typer

from tidegate.cli import output
from tidegate.cli.api import Service, control, part
from tidegate.cli.options import Json
from tidegate.kernel.errors import NotFound

Fields = Mapping[str, Any]
# Fields of a stored object that `apply` does not accept.
_STORED = ("revision", "created_at", "override", "previous")
# Fields that are always written, even with their default values, because people look for them in the file.
_ALWAYS = ("min_replicas", "max_replicas")


def export(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="An endpoint, a deployment or a model.")
    ] = None,
    json: Json = False,
) -> None:
    """Print Deployments, Endpoints and models as YAML for `tidegate apply`. Without NAME, print all.

    Fields with default values are left out, except min_replicas and max_replicas. Example: tidegate export
    digits > state.yaml
    """
    registry = control().registry
    intention = registry.get("/v1/intention")
    stated = selected(intention, name)
    if models := _models(registry, intention, {each["model"] for each in stated["deployments"]}):
        stated["models"] = models
    output.show(stated, json, lambda: print(text_of(stated, intention["deployments"]), end=""))


def selected(intention: Fields, name: str | None) -> dict[str, list[dict[str, Any]]]:
    """Return the body of `/v1/apply` for ``name``, or for everything. Raise NotFound for an unknown name."""
    deployments, endpoints = intention["deployments"], intention["endpoints"]
    if name is not None:
        deployments, endpoints = _named(name, deployments, endpoints)
    return {
        "deployments": [_stated(each, _defaults_for(each)) for each in deployments],
        "endpoints": [
            _without_id(_stated(_before_rollout(each), _endpoint_defaults())) for each in endpoints
        ],
    }


def text_of(stated: Mapping[str, list[dict[str, Any]]], held: Iterable[Fields]) -> str:
    """Return the exported objects as YAML for `tidegate apply`.

    Comments at the top list the versions that must be registered before `tidegate apply`. They also list the
    Deployments whose number of replicas `tidegate scale` has fixed. `tidegate apply` ignores these comments.

    ``stated``: the exported objects by kind. ``held``: the Deployments as the registry stores them.
    """
    import yaml

    names = {each["name"] for each in stated["deployments"]}
    versions = sorted({(each["model"], each["version"]) for each in stated["deployments"]})
    needs = ", ".join(f"{model} {version}" for model, version in versions)
    lines = [f"# Needs the registered versions: {needs}" if needs else "# Nothing is deployed."]
    lines += [
        f"# {each['name']} is held at {each['override']['replicas']} replicas by `tidegate scale`; "
        "this file does not contain the hold."
        for each in held
        if each["name"] in names and each.get("override")
    ]
    documents = [{"kind": "Model", **each} for each in stated.get("models", ())]
    documents += [{"kind": "Deployment", **each} for each in stated["deployments"]]
    documents += [{"kind": "Endpoint", **each} for each in stated["endpoints"]]
    body = yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True) if documents else ""
    return "\n".join(lines) + "\n" + body


def _models(registry: Service, intention: Fields, names: set[str]) -> list[dict[str, Any]]:
    """Return the aliases and the policy of each model in ``names``. Leave out models that have neither."""
    found = []
    for name in sorted(names):
        policy = registry.get(f"/v1/models/{part(name)}/policy")
        aliases = (intention.get("aliases") or {}).get(name)
        limits = {key: value for key, value in policy["retention"].items() if value}
        kept = {key: value for key, value in {**policy, "retention": limits}.items() if value}
        if aliases or kept:
            found.append({"name": name, **({"aliases": aliases} if aliases else {}), **kept})
    return found


def _named(name: str, deployments: list[Any], endpoints: list[Any]) -> tuple[list[Any], list[Any]]:
    """Return the Deployments and Endpoints to export for one name.

    ``name``: the name of an endpoint, a deployment or a model.
    """
    by_name = {each["name"]: each for each in deployments}
    for endpoint in endpoints:
        if endpoint["name"] == name:
            shadows = [endpoint["shadow"]] if endpoint.get("shadow") else []
            named = [*endpoint["targets"], *endpoint["previous"], *shadows]
            used = dict.fromkeys(each["deployment"] for each in named)
            return [by_name[each] for each in used if each in by_name], [endpoint]
    if name in by_name:
        return [by_name[name]], []
    of_model = {each["name"]: each for each in deployments if each["model"] == name}
    if not of_model:
        raise NotFound(
            f"There is no endpoint, deployment or deployed model {name!r}. `tidegate status` lists them."
        )
    using = [e for e in endpoints if all(target["deployment"] in of_model for target in e["targets"])]
    return list(of_model.values()), using


def _before_rollout(endpoint: Fields) -> Fields:
    """Return an endpoint for the export, with the targets that it had before its rollout.

    If the rollout is running or paused, the field ``rollout`` contains only the canary and its options. If
    the rollout has ended, the endpoint keeps its present targets, and ``rollout`` is None. An endpoint
    without a rollout is returned unchanged.
    """
    rollout = endpoint.get("rollout")
    if rollout is None:
        return endpoint
    if rollout["phase"] not in ("running", "paused"):
        return {**endpoint, "rollout": None}
    options = _without_defaults(rollout["options"], _canary_defaults())
    canary = {"deployment": rollout["deployment"], **({"options": options} if options else {})}
    return {**endpoint, "targets": rollout["base"], "rollout": canary}


@cache
def _canary_defaults() -> dict[str, Any]:
    from tidegate.kernel.protocol.models import CanaryOptions

    return CanaryOptions().model_dump(mode="json")


def _stated(held: Fields, defaults: Fields) -> dict[str, Any]:
    """Return the fields of a stored object that belong in an exported file.

    Leave out the fields that the registry adds, and fields with default values. Never leave out the fields in
    ``_ALWAYS``.
    """
    return {
        key: _without_defaults(value, defaults.get(key)) if isinstance(value, dict) else value
        for key, value in held.items()
        if key not in _STORED and (key in _ALWAYS or key not in defaults or value != defaults[key])
    }


def _without_id(endpoint: dict[str, Any]) -> dict[str, Any]:
    """Return an endpoint without the id that the registry has given to its shadow."""
    shadow = endpoint.get("shadow")
    if shadow is None:
        return endpoint
    return {**endpoint, "shadow": {key: value for key, value in shadow.items() if key != "id"}}


def _without_defaults(value: dict[str, Any], defaults: Any) -> dict[str, Any]:
    if not isinstance(defaults, dict):
        return value
    return {key: each for key, each in value.items() if key not in defaults or each != defaults[key]}


def _defaults_for(deployment: Fields) -> dict[str, Any]:
    """Return the default values of a Deployment's fields.

    If the Deployment has the field ``llm``, include the default values inside this field.
    """
    return _deployment_defaults() | (_llm_defaults() if deployment.get("llm") else {})


@cache
def _llm_defaults() -> dict[str, Any]:
    from tidegate.kernel.protocol.models import LlmSpec

    return {"llm": LlmSpec().model_dump(mode="json")}


@cache
def _deployment_defaults() -> dict[str, Any]:
    from tidegate.kernel.protocol.models import DeploymentSpec

    spec = DeploymentSpec(name="x", model="x", version=1)
    return _only_defaults(spec.model_dump(mode="json"), ("name", "model", "version"))


@cache
def _endpoint_defaults() -> dict[str, Any]:
    from tidegate.kernel.protocol.models import EndpointSpec, Target

    spec = EndpointSpec(name="x", targets=[Target(deployment="x")])
    return _only_defaults(spec.model_dump(mode="json"), ("name", "targets"))


def _only_defaults(fields: dict[str, Any], required: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key not in required}
