"""Change which version serves: ``rollback`` and ``split``."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Annotated

import typer

from tidegate.cli import output
from tidegate.cli.api import Control, Doc, control, part
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.options import Json, seconds
from tidegate.cli.progress import Steps
from tidegate.kernel.errors import BadRequest

Endpoint = Annotated[str, typer.Argument(metavar="NAME", help="The endpoint's name.")]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it serves.")]
Timeout = Annotated[str, typer.Option(metavar="TIME", help="How long to wait.")]


def rollback(
    name: Endpoint,
    to: Annotated[
        int | None,
        typer.Option("--to", metavar="N", min=1, help="Version to go back to; default: the previous one."),
    ] = None,
    wait: Wait = True,
    timeout: Timeout = "5m",
    json: Json = False,
) -> None:
    """Go back to the version that served before, without a failed call.

    The current version serves until the earlier version has a ready replica. A deployment that was deleted
    is created again. Example: tidegate rollback digits --to 2
    """
    from tidegate.cli.publish import wait_serving
    from tidegate.cli.serving import show

    limit_s = seconds(timeout)
    plane, began = control(), time.monotonic()
    with Steps().shown() as steps:
        body = {} if to is None else {"version": to}
        placed: Doc = plane.registry.post(f"/v1/endpoints/{part(name)}/rollback", body)
        steps.change("rollback", "done", rolled(placed))
        status = wait_serving(plane, placed, limit_s, steps) if wait else None
    document = {**placed, "status": status, "seconds": time.monotonic() - began}
    output.show(document, json, lambda: show(name, document))


def rolled(placed: Doc) -> str:
    """Describe a rollback in words."""
    deployment, replaced = placed["deployment"], placed["replaced"]
    if not replaced:
        return f"version {deployment['version']} serves already"
    made = f"; {deployment['name']} was deleted and is created again" if placed["remade"] else ""
    return f"from {', '.join(replaced)} to {deployment['name']} (version {deployment['version']}){made}"


def split(
    name: Endpoint,
    shares: Annotated[
        list[str],
        typer.Argument(
            metavar="VERSION=SHARE...",
            help="Shares, such as v1=90 v2=10. A deployment's name is allowed instead of a version.",
        ),
    ],
    wait: Wait = True,
    timeout: Timeout = "5m",
    json: Json = False,
) -> None:
    """Share an endpoint's traffic among versions, as for a canary.

    The traffic of a version is its share divided by the sum of all shares. Versions that are not named get no
    traffic. The current versions serve until each version with a share has a ready replica. Example: tidegate
    split digits v1=90 v2=10
    """
    wanted, limit_s = weights(shares), seconds(timeout) if wait else None
    plane = control()
    targets = _targets(plane, name, wanted)
    told = ", ".join(
        f"{t['deployment']} {share:.4g}%" for t, share in zip(targets, percent(wanted), strict=True)
    )
    with Steps().shown() as steps:
        endpoint = plane.registry.post(f"/v1/endpoints/{part(name)}/split", {"targets": targets})
        steps.change(name, "done", told)
        if limit_s is not None:
            _wait_settled(plane, name, targets, limit_s, steps)
    document = {"endpoint": endpoint, "shares": dict(zip(wanted, percent(wanted), strict=True))}
    output.show(document, json, lambda: output.line(f"{name}: {told}"))


def weights(shares: Sequence[str]) -> dict[str, int]:
    """Parse ``v1=90`` arguments. Return a whole-number weight for each version or Deployment.

    Raise UsageError for a share that is wrong or too small.
    """
    found: dict[str, Decimal] = {}
    for text in shares:
        key, equals, number = text.partition("=")
        try:
            share = Decimal(number.removesuffix("%"))
        except InvalidOperation:
            share = Decimal(-1)
        if not key or not equals or not share.is_finite() or not 0 <= share <= 10_000:
            raise UsageError(f"{text!r} is not a share: write VERSION=NUMBER, as in v1=90 v2=10.")
        if key in found:
            raise UsageError(f"{key} is named twice.")
        found[key] = share
    if not sum(found.values()):
        raise UsageError("All shares are 0, so no version would get a request.")
    # The registry's weights are whole numbers, but shares can have two decimal places. So multiply by 100.
    scale = 1 if all(share == int(share) for share in found.values()) else 100
    whole = {key: int((share * scale).to_integral_value()) for key, share in found.items()}
    lost = [key for key, share in found.items() if share and not whole[key]]
    if lost:
        raise UsageError(f"The share of {', '.join(lost)} is too small. Give at least 0.01.")
    return whole


def percent(wanted: Mapping[str, int]) -> list[float]:
    """Return each weight as a percentage of the sum."""
    total = sum(wanted.values())
    return [100 * weight / total for weight in wanted.values()]


def _targets(plane: Control, name: str, wanted: Mapping[str, int]) -> list[Doc]:
    """Return the endpoint's new targets. Raise BadRequest if a version has no Deployment."""
    endpoint = plane.registry.get(f"/v1/endpoints/{part(name)}")
    held = plane.registry.pages("/v1/deployments")
    return chosen(endpoint, held, wanted)


def chosen(endpoint: Doc, held: Sequence[Doc], wanted: Mapping[str, int]) -> list[Doc]:
    """Return the targets of an endpoint: a Deployment and a weight for each entry of ``wanted``.

    ``wanted``: weights by version (``v2`` or ``2``) or by Deployment name. ``held``: all Deployments.

    If several Deployments run a version, prefer a Deployment that the endpoint uses. If it uses none of them,
    prefer the Deployment that ``deploy`` created.

    Raise BadRequest if a version has no Deployment, or has several and none of them is preferred. Raise
    UsageError for two shares of one Deployment.
    """
    by_name = {deployment["name"]: deployment for deployment in held}
    named = [target["deployment"] for target in [*endpoint["targets"], *endpoint["previous"]]]
    models = {by_name[each]["model"] for each in named if each in by_name}
    targets: list[Doc] = []
    for key, weight in wanted.items():
        target = key if key in by_name else _of_version(key, named, models, held)
        if target is None:
            there = ", ".join(sorted(f"v{d['version']} ({d['name']})" for d in held if d["model"] in models))
            model = min(models, default=endpoint["name"])
            number = key.removeprefix("v") if re.fullmatch(r"v?\d+", key) else "N"
            raise BadRequest(
                f"{key} of {endpoint['name']} has no Deployment. Existing: {there or 'none'}. Create one "
                f"without traffic: tidegate deploy {model} --version {number} --no-traffic"
            )
        if target in (each["deployment"] for each in targets):
            raise UsageError(f"{key} is {target}, which already has a share. Give each version one share.")
        targets.append({"deployment": target, "weight": weight})
    return targets


def _of_version(key: str, named: Sequence[str], models: set[str], held: Sequence[Doc]) -> str | None:
    if not re.fullmatch(r"v?\d+", key):
        return None
    number = int(key.removeprefix("v"))
    those = [d["name"] for d in held if d["model"] in models and d["version"] == number]
    preferred = [each for each in those if each in named] or [
        each for each in those if each in {f"{model}-v{number}" for model in models}
    ]
    if preferred:
        return str(preferred[0])
    if len(those) > 1:
        raise BadRequest(
            f"Version {number} has several Deployments. Name one of them: {', '.join(sorted(those))}."
        )
    return str(those[0]) if those else None


def _wait_settled(plane: Control, name: str, targets: list[Doc], timeout_s: float, steps: Steps) -> None:
    """Wait until each version with a share is ready."""
    from tidegate.cli.publish import wait_serving

    end = time.monotonic() + timeout_s
    for target in targets:
        if target["weight"]:
            placed = {"deployment": {"name": target["deployment"]}, "endpoint": {"name": name}}
            wait_serving(plane, placed, max(end - time.monotonic(), 0.0), steps)
