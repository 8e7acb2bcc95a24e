"""Plan the changes that point an alias such as ``champion`` to a version, or that delete an alias. Pure."""

from __future__ import annotations

from services.registry.domain import names
from services.registry.domain.desired_state import Change, DropAlias, PutAlias, RegistrySnapshot
from services.registry.domain.references import check_alias
from tidegate.kernel.errors import BadRequest, Conflict, NotFound

# The maximum number of aliases of one model.
MOST = 100


def put(
    snapshot: RegistrySnapshot, model: str, alias: str, number: int, expected: int | None = None
) -> list[Change]:
    """Plan to point an alias to a version. Return no changes if it points there already.

    ``expected`` is the version to which the alias must point now. With 0, the alias must not exist. With
    None, there is no condition. Raise Conflict if the condition is not met, NotFound for an unknown version,
    or BadRequest for an invalid alias.
    """
    check_alias(alias)
    if (model, number) not in snapshot.versions:
        raise names.unknown_version(model, number)
    now = snapshot.aliases.get((model, alias))
    if expected is not None and (now or 0) != expected:
        there = f"points to version {now}" if now else "does not exist"
        wanted = (
            f"the request expected it to point to version {expected}"
            if expected
            else ("the request expected no such alias")
        )
        raise Conflict(
            f"Alias {alias!r} of model {model!r} {there}, but {wanted}. Read the alias again and repeat the "
            "change."
        )
    if now is None and len(snapshot.aliases_of(model)) >= MOST:
        raise BadRequest(f"Model {model!r} has {MOST} aliases, the limit. Delete one first.")
    return [] if now == number else [PutAlias(model, alias, number, created=now is None)]


def drop(snapshot: RegistrySnapshot, model: str, alias: str) -> list[Change]:
    """Plan to delete an alias. Raise NotFound for an unknown alias."""
    if (model, alias) not in snapshot.aliases:
        raise unknown(model, alias, snapshot.aliases_of(model))
    return [DropAlias(model, alias)]


def unknown(model: str, alias: str, known: dict[str, int]) -> NotFound:
    """Return the error for an unknown alias. Its message lists the model's aliases."""
    there = ", ".join(f"{name} ({number})" for name, number in sorted(known.items())) or "none"
    return NotFound(
        f"Model {model[:80]!r} has no alias {alias[:80]!r}. Its aliases: {there}. To set this one: tidegate "
        f"alias set {model[:80]} {alias[:80]} N"
    )
