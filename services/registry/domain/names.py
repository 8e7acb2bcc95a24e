"""Check names of models, Deployments and Endpoints, and build errors for unknown names."""

from __future__ import annotations

from collections.abc import Iterable

from tidegate.kernel.errors import BadRequest, Conflict, NotFound
from tidegate.kernel.protocol import names

# The command that lists the objects of each kind.
_LISTED_BY = {"model": "models", "Deployment": "deployments", "Endpoint": "status"}


def check(kind: str, name: str) -> str:
    """Return ``name``. Raise BadRequest unless it is valid; the message describes a valid name."""
    if (problem := names.problem(kind, name)) is not None:
        raise BadRequest(problem)
    return name


def check_new(kind: str, name: str, others: Iterable[str]) -> str:
    """Return the name of a new object. Raise Conflict if an existing name differs only by case.

    Names are also used for folders, files and hosts. Where the system ignores case, two such names would
    collide.
    """
    twin = names.same_but_for_case(check(kind, name), set(others))
    if twin is not None:
        raise Conflict(
            f"There is already a {kind} {twin!r}, and {name!r} differs from it only by case. Use {twin!r}, "
            "or choose another name."
        )
    return name


def unknown(kind: str, name: str) -> NotFound:
    """Return the error for a model, Deployment or Endpoint that does not exist."""
    return NotFound(f"There is no {kind} {name[:80]!r}. `tidegate {_LISTED_BY[kind]}` lists them.")


def unknown_version(model: str, number: int) -> NotFound:
    """Return the error for a version that does not exist."""
    return NotFound(f"Model {model[:80]!r} has no version {number}. `tidegate versions MODEL` lists them.")


def quoted(names_: Iterable[str]) -> str:
    """Return names for a message: quoted, separated by commas."""
    return ", ".join(repr(name) for name in names_)


def of_deployment(model: str, number: int) -> str:
    """Return the default name for a version's Deployment, such as ``digits-v2``.

    Raise BadRequest if the name would be too long.
    """
    name = f"{model}-v{number}"
    if names.problem("Deployment", name) is None:
        return name
    raise BadRequest(
        f"The Deployment's name would be {name!r}, which is longer than {names.LONGEST} characters. "
        "Use a shorter model name, or set name in the options of the Deployment."
    )
