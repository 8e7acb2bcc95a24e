"""Plan the changes for a model that a file describes: its policy and its aliases. Pure.

`tidegate apply` sends the contents of such a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from services.registry.domain import aliases, filters, merge
from services.registry.domain.desired_state import Change, DropAlias, PutPolicy, RegistrySnapshot
from services.registry.domain.model_policy import ModelPolicy
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.models import LARGEST, Name


class StatedModel(ModelPolicy):
    """A model in a file: its policy and aliases. ``aliases`` None: do not change the aliases."""

    name: Name
    aliases: dict[str, Annotated[int, Field(ge=1, le=LARGEST)]] | None = Field(None, max_length=aliases.MOST)

    def policy(self) -> ModelPolicy:
        """Return the policy in the file."""
        return ModelPolicy.model_validate(self.model_dump(exclude={"name", "aliases"}))


def put_model(snapshot: RegistrySnapshot, name: str, fields: Mapping[str, Any]) -> list[Change]:
    """Plan to replace a model's policy, and its aliases if the file has them.

    Raise BadRequest for invalid fields or a model without versions, NotFound for an unknown version.
    """
    stated = merge.checked(StatedModel, {**fields, "name": name}, f"Model {name!r}")
    if not snapshot.numbers(name):
        raise BadRequest(
            f"Model {name!r} has no version. Register one first: tidegate deploy FILE --name {name}"
        )
    for stage in stated.stages:
        filters.parse(stage.checks)
    changes: list[Change] = []
    if stated.policy() != snapshot.policies.get(name, ModelPolicy()):
        changes.append(PutPolicy(name, stated.policy()))
    if stated.aliases is not None:
        gone = sorted(set(snapshot.aliases_of(name)) - set(stated.aliases))
        changes += [DropAlias(name, alias) for alias in gone]
        for alias, number in sorted(stated.aliases.items()):
            changes += aliases.put(snapshot, name, alias, number)
    return changes
