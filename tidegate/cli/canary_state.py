"""Read the state of a rollout, and describe it in text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tidegate.cli import output
from tidegate.cli.api import Control, Doc, part

ENDED = ("promoted", "rolled_back", "aborted")


def read(plane: Control, name: str) -> Doc:
    """Return the rollout with its evidence, and the shadow if it exists.

    If the router has not read this rollout yet, it returns the evidence of an older rollout. That evidence is
    left out of the result.
    """
    from tidegate.cli import shadow

    endpoint = plane.registry.get(f"/v1/endpoints/{part(name)}")
    rollout = endpoint["rollout"]
    shown: Doc = plane.router.get(f"/v1/rollouts/{part(name)}")
    known = shown.get("rollout")
    if rollout is not None and (known is None or known["id"] != rollout["id"]):
        shown = {"endpoint": name}
    shadowed = shadow.read(plane, name) if endpoint.get("shadow") is not None else None
    return {**shown, "rollout": rollout, "shadow": shadowed}


def line_of(found: Mapping[str, Any]) -> str:
    """Return a rollout's state in one line."""
    rollout = found["rollout"]
    if rollout["phase"] in ENDED:
        return f"{rollout['deployment']} {rollout['phase'].replace('_', ' ')}: {rollout['reason']}"
    steps = rollout["options"]["steps"]
    missing = "; ".join(found.get("missing", ()))
    at = f"{rollout['deployment']} at {steps[rollout['step']]}%, step {rollout['step'] + 1} of {len(steps)}"
    return f"{at} ({rollout['phase']}){': ' + missing if missing else ''}"


def event_line(event: Mapping[str, Any]) -> str:
    """Return an event of a rollout in one line."""
    return f"{output.moment(event['at'])}  {event['share']:>3}%  {event['phase']}: {event['reason']}"
