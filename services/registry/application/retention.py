"""Apply the retention of models: delete the versions that their policy does not keep."""

from __future__ import annotations

from services.registry.adapters.sql import audit, deleted, policies
from services.registry.adapters.sql.reading import DesiredStateReader
from services.registry.application.transactions import Transactions
from services.registry.domain import names, retention, rollback
from services.registry.domain.desired_state import PutPolicy, RegistrySnapshot
from services.registry.domain.model_policy import ModelPolicy, RetentionPolicy, patched
from services.registry.domain.retention import Fate
from tidegate.kernel import telemetry
from tidegate.kernel.errors import Conflict, NotFound
from tidegate.kernel.protocol.access import ADMIN
from tidegate.kernel.service import caller

log = telemetry.logger(__name__)


class Retention:
    """Read and change the policies of models, and delete the versions that a policy does not keep."""

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions

    async def policy(self, model: str) -> ModelPolicy:
        """Return a model's policy. Raise NotFound for an unknown model."""
        async with self._transactions.read() as reader:
            await _check_model(reader, model)
            return (await policies.read(reader.connection)).get(model, ModelPolicy())

    async def change_policy(self, model: str, patch: dict[str, object]) -> ModelPolicy:
        """Change a model's policy by a JSON merge patch. Return the new policy.

        Raise NotFound for an unknown model, or BadRequest if the new policy is invalid. Raise Forbidden if
        the patch changes ``stages`` or ``serve_from`` and the caller lacks the scope ``admin``.
        """
        async with self._transactions.change() as writer:
            await _check_model(writer, model)
            before = (await policies.read(writer.connection)).get(model, ModelPolicy())
            after = patched(before, patch)
            if after.guards(before):
                caller.require(ADMIN)
            if after != before:
                await writer.apply([PutPolicy(model, after)])
        return after

    async def plan(self, model: str, policy: RetentionPolicy | None = None) -> list[Fate]:
        """Return for each version whether ``policy`` deletes it, and why. Change nothing.

        ``policy`` None: use the model's own policy.
        """
        async with self._transactions.read() as reader:
            await _check_model(reader, model)
            return await _fates(reader, model, policy)

    async def apply(self, model: str) -> list[Fate]:
        """Delete the versions that a model's policy does not keep. Return the decision on each version."""
        async with self._transactions.change() as writer:
            await _check_model(writer, model)
            found = await _fates(writer, model, None)
            await writer.apply(retention.deletions(model, found))
        return found

    async def apply_all(self) -> None:
        """Apply the retention of every model that has one."""
        async with self._transactions.read() as reader:
            known = await policies.read(reader.connection)
        for model in sorted(model for model, policy in known.items() if policy.retention.active):
            if any(fate.delete for fate in await self._plan_or_none(model)):
                gone = [fate.version for fate in await self.apply(model) if fate.delete]
                log.info("retention deleted versions", extra={"model": model, "versions": gone})

    async def _plan_or_none(self, model: str) -> list[Fate]:
        try:
            return await self.plan(model)
        except NotFound:  # all versions of this model are deleted
            return []


async def _fates(reader: DesiredStateReader, model: str, policy: RetentionPolicy | None) -> list[Fate]:
    snapshot = await reader.snapshot()
    if policy is None:
        policy = (await policies.read(reader.connection)).get(model, ModelPolicy()).retention
    created = await deleted.registered(reader.connection, model)
    targets = await _rollback_targets(reader, snapshot, model)
    return retention.fates(snapshot, model, created, targets, policy, reader.now)


async def _rollback_targets(
    reader: DesiredStateReader, snapshot: RegistrySnapshot, model: str
) -> dict[int, str]:
    """Return the versions of a model that would serve again after a rollback of an Endpoint.

    Each key is a version number. Each value is the text "endpoint NAME", for messages.
    """
    found: dict[int, str] = {}
    for name, stored in snapshot.endpoints.items():
        targets = [*stored.spec.targets, *stored.spec.previous]
        if not any(snapshot.deployments[each.deployment].spec.model == model for each in targets):
            continue
        history = await audit.history_of(reader.connection, name, set(snapshot.deployments))
        try:
            plan = rollback.rollback(snapshot, name, None, history, reader.now.timestamp())
        except (Conflict, NotFound):
            continue
        if plan.model == model:
            found[plan.version] = f"endpoint {name!r}"
    return found


async def _check_model(reader: DesiredStateReader, model: str) -> None:
    if not await reader.numbers([model]):
        raise names.unknown("model", model)
