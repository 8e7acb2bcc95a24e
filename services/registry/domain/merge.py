"""Partial specs laid over whole ones, and pydantic's findings said in a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.models import DeploymentSpec

T = TypeVar("T", bound=BaseModel)


def patched(base: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """JSON merge patch (RFC 7396): objects merge, null removes (back to the default), the rest replaces."""
    merged = dict(base)
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, Mapping):
            below = merged.get(key)
            merged[key] = patched(below if isinstance(below, Mapping) else {}, value)
        else:
            merged[key] = value
    return merged


def deployment(
    base: Mapping[str, Any], patch: Mapping[str, Any], what: str, *, exact_follows: bool = False
) -> DeploymentSpec:
    """``patch`` over ``base`` as a checked DeploymentSpec.

    Where only one of min_replicas and max_replicas is given, and the default of the other contradicts it,
    the other follows: `--min 3` alone means exactly 3. One that ``base`` has stays as it is. With
    ``exact_follows`` it follows if ``base`` is for an exact number. Raises BadRequest.
    """
    merged = patched(base, patch)
    low, high = patch.get("min_replicas"), patch.get("max_replicas")
    exact = exact_follows and base.get("min_replicas", 1) == base.get("max_replicas", 1)
    if high is None and (exact or "max_replicas" not in base) and _above(low, merged.get("max_replicas", 1)):
        merged["max_replicas"] = low
    if low is None and (exact or "min_replicas" not in base) and _above(merged.get("min_replicas", 1), high):
        merged["min_replicas"] = high
    spec = checked(DeploymentSpec, merged, what)
    if spec.min_replicas > spec.max_replicas:
        raise BadRequest(
            f"{what}: min_replicas {spec.min_replicas} is above max_replicas {spec.max_replicas}. "
            "State both in one command: "
            f"`tidegate policy NAME --set min_replicas={spec.min_replicas} --set max_replicas=N`."
        )
    if spec.max_replicas == 0:
        raise BadRequest(
            f"{what}: max_replicas is 0, so it could never serve; min_replicas 0 lets it sleep, "
            "an override of 0 stops it for a while."
        )
    return spec


def _above(low: Any, high: Any) -> bool:
    return isinstance(low, int) and isinstance(high, int) and low > high


def checked(model: type[T], data: Any, what: str) -> T:
    """``data`` as ``model``; raises BadRequest that names each field that is wrong, and how."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        findings = "; ".join(_finding(found) for found in error.errors()[:5])
        raise BadRequest(f"{what}: {findings}.") from None


def _finding(found: Any) -> str:
    where = ".".join(str(step) for step in found["loc"])
    match found["type"]:
        case "extra_forbidden":
            return f"there is no field {where!r}"
        case "missing":
            return f"{where} is required"
        case _:
            given = found["input"]
            shown = f", not {str(given)[:80]!r}" if isinstance(given, str | int | float | bool) else ""
            text = f"{found['msg'][0].lower()}{found['msg'][1:]}"
            return f"{where}: {text}{shown}" if where else f"{text}{shown}"
