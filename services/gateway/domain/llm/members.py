"""Read members of a request's JSON object. A wrong type raises a BadRequest that names the member."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tidegate.kernel.errors import BadRequest

Members = Mapping[str, Any]


def text(members: Members, name: str, default: str | None = None) -> str:
    """Return a member that is a string; ``default`` if it is missing.

    Raise BadRequest if it is missing and there is no default.
    """
    value = members.get(name)
    if value is None:
        value = default
    if value is None:
        raise BadRequest(f"the request has no {name!r}; it must be a string")
    if not isinstance(value, str):
        raise _wrong(name, "a string", value)
    return value


def whole(members: Members, name: str, least: int | None = None) -> int | None:
    """Return a member that is an integer, at least ``least``; None if the member is absent."""
    value = members.get(name)
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise _wrong(name, "an integer", value)
    if least is not None and value < least:
        raise BadRequest(f"{name!r} must be at least {least}, got {value}")
    return value


def real(members: Members, name: str) -> float | None:
    """Return a member that is a number; None if the member is absent."""
    value = members.get(name)
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise _wrong(name, "a number", value)
    return value


def flag(members: Members, name: str, default: bool = False) -> bool:
    """Return a member that is true or false."""
    value = members.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise _wrong(name, "true or false", value)
    return value


def texts(members: Members, name: str) -> list[str]:
    """Return a member that is a list of strings, or a single string as a list."""
    value = members.get(name)
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if not isinstance(value, Sequence) or not all(isinstance(each, str) for each in value):
        raise _wrong(name, "a list of strings", value)
    return list(value)


def group(members: Members, name: str) -> dict[str, Any]:
    """Return a member that is an object; empty if the member is absent."""
    value = members.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _wrong(name, "an object", value)
    return value


def groups(members: Members, name: str) -> list[dict[str, Any]]:
    """Return a member that is a list of objects; empty if the member is absent."""
    value = members.get(name)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise _wrong(name, "a list of objects", value)
    return value


def _wrong(name: str, expected: str, value: Any) -> BadRequest:
    return BadRequest(f"{name!r} must be {expected}, got {type(value).__name__}")
