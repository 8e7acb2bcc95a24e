"""Merge partial specs into stored specs, and describe pydantic's errors in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.models import DeploymentSpec

T = TypeVar("T", bound=BaseModel)

# The last parts of the fields in which a user may have typed a secret by mistake.
SECRETS = (("credential",), ("credential_header",), ("upstream",))


def patched(base: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with a JSON merge patch (RFC 7396) applied. null restores a field's default."""
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
    """Return ``base`` with ``patch`` applied, as a checked DeploymentSpec.

    If ``patch`` sets only min_replicas or only max_replicas, the minimum can exceed the maximum. Then the
    field that ``patch`` does not set gets the value of the other field in these cases:

    - ``base`` does not set the field that ``patch`` leaves out.
    - ``exact_follows`` is True, and the minimum and the maximum are equal in ``base``.

    So `--min 3` alone can mean exactly 3 replicas.

    Raise BadRequest for invalid fields, if the minimum still exceeds the maximum, or if the maximum is 0.
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
            "Set both in one command: "
            f"`tidegate policy NAME --set min_replicas={spec.min_replicas} --set max_replicas=N`."
        )
    if spec.max_replicas == 0:
        raise BadRequest(
            f"{what}: max_replicas is 0, so it could never serve. Use min_replicas 0 to scale to zero, "
            "or an override of 0 to pause it."
        )
    return spec


def _above(low: Any, high: Any) -> bool:
    return isinstance(low, int) and isinstance(high, int) and low > high


def checked(model: type[T], data: Any, what: str) -> T:
    """Return ``data`` as an object of class ``model``. Raise BadRequest with the problem of each field."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = "; ".join(_problem(each) for each in error.errors()[:5])
        raise BadRequest(f"{what}: {problems}.") from None


def _problem(error: Any) -> str:
    where = ".".join(str(step) for step in error["loc"])
    match error["type"]:
        case "extra_forbidden":
            return f"there is no field {where!r}"
        case "missing":
            return f"{where} is required"
        case _:
            # Do not show the value: the user may have typed a credential here by mistake.
            value = "" if error["loc"][-1:] in SECRETS else error["input"]
            shown = (
                f", not {str(value)[:80]!r}"
                if isinstance(value, str | int | float | bool) and value != ""
                else ""
            )
            text = f"{error['msg'][0].lower()}{error['msg'][1:]}"
            return f"{where}: {text}{shown}" if where else f"{text}{shown}"
