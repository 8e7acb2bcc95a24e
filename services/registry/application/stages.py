"""Move versions between stages, and store approvals of versions. Each change is in the audit log."""

from __future__ import annotations

from dataclasses import dataclass

from services.registry.adapters.sql import keys, policies
from services.registry.adapters.sql import stages as stored
from services.registry.adapters.sql.reading import DesiredStateReader
from services.registry.adapters.sql.search import Search, find
from services.registry.application.transactions import Transactions
from services.registry.domain import filters, names, stages
from services.registry.domain.desired_state import ChangeNotification
from services.registry.domain.filters import Condition, Subject
from services.registry.domain.model_policy import NO_STAGE, ModelPolicy, Stage
from services.registry.domain.stages import Approval, StageFacts
from tidegate.kernel.errors import NotFound
from tidegate.kernel.service import caller


@dataclass(frozen=True, slots=True)
class StageView:
    """The stage and the approvals of a version, and what it lacks for the next stage.

    ``stage`` None: the version has no stage. ``next`` None: the version is in the last stage. ``missing``:
    the requirements of the next stage that the version does not meet.
    """

    stage: str | None
    approvals: list[Approval]
    next: str | None
    missing: list[str]


class Stages:
    """Read and change the stages and approvals of versions."""

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions

    async def view(self, model: str, number: int) -> StageView:
        """Return the stage of a version, and which requirements of the next stage are not met.

        Raise NotFound for an unknown version.
        """
        async with self._transactions.read() as reader:
            return await _view(reader, model, number)

    async def move(self, model: str, number: int, name: str) -> StageView:
        """Move a version to a stage. The name ``none`` takes the version out of its stage.

        Raise NotFound for an unknown version, or BadRequest for an unknown stage. Raise Conflict if the
        version does not meet the requirements of the stage.
        """
        async with self._transactions.change() as writer:
            policy = await _policy(writer, model, number)
            before = (await stored.find(writer.connection, model, number)).stage
            after = None if name == NO_STAGE else name
            if after is not None:
                stage = stages.stage_of(policy, model, after)
                stages.enter(policy, model, number, after, await _facts(writer, model, number, stage))
            if after != before:
                await stored.put(writer.connection, model, number, after)
                await writer.note(_updated(model, number), {"stage": before}, {"stage": after})
            return await _view(writer, model, number)

    async def approve(self, model: str, number: int, name: str, comment: str) -> StageView:
        """Approve a version for a stage. Raise Forbidden if the caller lacks the scope for this stage."""
        async with self._transactions.change() as writer:
            stage = stages.stage_of(await _policy(writer, model, number), model, name)
            principal = caller.require(stage.scope)
            approval = Approval(name, principal.id, principal.name, writer.now, comment)
            await stored.approve(writer.connection, model, number, approval)
            await writer.note(_updated(model, number), None, {"approved": name, "comment": comment})
            return await _view(writer, model, number)

    async def withdraw(self, model: str, number: int, name: str) -> None:
        """Withdraw the caller's approval of a version for a stage. Raise NotFound if there is none."""
        async with self._transactions.change() as writer:
            await _policy(writer, model, number)
            mine = caller.current.get().principal
            if not await stored.withdraw(writer.connection, model, number, name, mine.id):
                raise NotFound(
                    f"{mine.name!r} has not approved version {number} of model {model!r} for {name!r}."
                )
            await writer.note(_updated(model, number), {"approved": name}, {"approved": None})


async def _policy(reader: DesiredStateReader, model: str, number: int) -> ModelPolicy:
    """Return the policy of a version's model. Raise NotFound if the version does not exist."""
    if await reader.version(model, number) is None:
        raise names.unknown_version(model, number)
    return (await policies.read(reader.connection)).get(model, ModelPolicy())


async def _view(reader: DesiredStateReader, model: str, number: int) -> StageView:
    policy = await _policy(reader, model, number)
    current = await stored.find(reader.connection, model, number)
    approvals = await stored.approvals(reader.connection, model, number)
    rank = policy.rank(current.stage)
    following = policy.stages[rank] if rank < len(policy.stages) else None
    lacks: list[str] = []
    if following is not None:
        facts = await _facts(reader, model, number, following)
        lacks = stages.missing(policy, following, facts)
    return StageView(current.stage, approvals, following.name if following else None, lacks)


async def _facts(reader: DesiredStateReader, model: str, number: int, stage: Stage) -> StageFacts:
    current = await stored.find(reader.connection, model, number)
    version = await reader.version(model, number)
    registered_by = current.registered_by
    owners = {} if registered_by is None else await keys.owners(reader.connection, [registered_by])
    return StageFacts(
        stage=current.stage,
        registered_by=registered_by,
        registered_for=owners.get(registered_by or ""),
        approvals=await stored.approvals(reader.connection, model, number),
        verification=version.verification.state if version is not None else "",
        checks_met=await _meets(reader, model, number, stage.checks),
    )


async def _meets(reader: DesiredStateReader, model: str, number: int, checks: str) -> bool:
    mine = (
        Condition(Subject("column", "model", "text"), "=", (model,)),
        Condition(Subject("column", "number", "number"), "=", (float(number),)),
    )
    found, _ = await find(reader.connection, Search((*mine, *filters.parse(checks))))
    return bool(found)


def _updated(model: str, number: int) -> ChangeNotification:
    return ChangeNotification("version", f"{model}/{number}", "updated")
