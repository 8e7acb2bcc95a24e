"""What things may be called."""

from __future__ import annotations

from collections.abc import Iterable

from tidegate.kernel.errors import BadRequest, Conflict
from tidegate.kernel.protocol import names


def check(kind: str, name: str) -> str:
    """Return ``name`` if it is a valid name; raise BadRequest, which says what one looks like."""
    if (problem := names.problem(kind, name)) is not None:
        raise BadRequest(problem)
    return name


def check_new(kind: str, name: str, others: Iterable[str]) -> str:
    """Return the name of a new object; raise Conflict if another one's differs in case only.

    Folders, files and hosts have these names, and some systems take both for the same.
    """
    twin = names.same_but_for_case(check(kind, name), set(others))
    if twin is not None:
        raise Conflict(
            f"There is a {kind} {twin!r}, and {name!r} differs from it in case only: use that name, or "
            "another one."
        )
    return name


def of_deployment(model: str, number: int) -> str:
    """Return the name of the Deployment that `deploy` makes for a version: ``digits-v2``."""
    name = f"{model}-v{number}"
    if names.problem("Deployment", name) is None:
        return name
    raise BadRequest(
        f"The Deployment would be called {name!r}, which is longer than {names.LONGEST} characters: "
        "give a shorter model name, or a name in the deployment's options."
    )
