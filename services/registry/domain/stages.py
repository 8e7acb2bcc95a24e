"""Check if a version may enter a stage, and if its stage allows it to serve. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from services.registry.domain import names
from services.registry.domain.desired_state import Change, PutDeployment, PutPolicy, RegistrySnapshot
from services.registry.domain.model_policy import ModelPolicy, Stage
from tidegate.kernel.errors import BadRequest, Conflict
from tidegate.kernel.protocol.access import JWT_PREFIX

REASON = "stage_required"


@dataclass(frozen=True, slots=True)
class Approval:
    """A principal's approval of a version for a stage.

    ``by``: the principal's name. ``owner``: the owner of the principal's key; None if the key has no owner.
    """

    stage: str
    principal: str
    by: str
    at: datetime
    comment: str = ""
    owner: str | None = None


@dataclass(frozen=True, slots=True)
class StageFacts:
    """The facts about a version that decide if it may enter a stage.

    ``stage``: the version's current stage. ``checks_met``: True if the version matches the filter of the
    stage to enter. ``verification``: the state of the version's verification. ``registered_by``: the
    principal that registered the version. ``registered_for``: the owner of that principal's key.
    """

    stage: str | None
    registered_by: str | None
    approvals: Sequence[Approval]
    verification: str
    checks_met: bool
    registered_for: str | None = None


def approver(principal: str, owner: str | None) -> tuple[str, str]:
    """Return the identity that gives an approval: the owner of a key, or the subject of a token.

    Several approvals of one identity count as one. The result is the kind of the identity and its name. For a
    key without an owner, the kind is ``key`` and the name is the id of the principal. Otherwise, the kind is
    ``owner``.
    """
    if owner is None and principal.startswith(JWT_PREFIX):
        owner = principal.removeprefix(JWT_PREFIX)
    return ("key", principal) if owner is None else ("owner", owner.casefold())


def stage_of(policy: ModelPolicy, model: str, name: str) -> Stage:
    """Return the stage ``name`` of a model. Raise BadRequest if the model has no such stage.

    The error lists the model's stages.
    """
    found = next((stage for stage in policy.stages if stage.name == name), None)
    if found is None:
        known = ", ".join(stage.name for stage in policy.stages) or "none"
        raise BadRequest(
            f"Model {model!r} has no stage {name[:40]!r}. Its stages: {known}. To change them: tidegate "
            f"stages {model} --set FILE.yaml"
        )
    return found


def missing(policy: ModelPolicy, stage: Stage, facts: StageFacts) -> list[str]:
    """Return the requirements of a stage that a version does not meet, as phrases; empty if it meets all."""
    found = []
    before = policy.rank(stage.name) - 1
    if policy.rank(facts.stage) < before:
        found.append(f"the version must be in the stage {policy.stages[before - 1].name} first")
    if stage.verified and facts.verification != "verified":
        found.append(f"the version must be verified, but it is {facts.verification}")
    if stage.checks and not facts.checks_met:
        found.append(f"the version does not match the stage's checks {stage.checks!r}")
    if (lack := _missing_approvals(stage, facts)) is not None:
        found.append(lack)
    return found


def _missing_approvals(stage: Stage, facts: StageFacts) -> str | None:
    """Return the missing approvals of a version as a phrase; None if it has enough."""
    approvals = [each for each in facts.approvals if each.stage == stage.name]
    others = {each.principal for each in approvals} - {facts.registered_by}
    given = {approver(each.principal, each.owner) for each in approvals}
    if facts.registered_by is not None:
        given.discard(approver(facts.registered_by, facts.registered_for))
    if len(given) >= stage.approvals:
        return None
    lack = (
        f"the version has {len(given)} of {stage.approvals} approvals by other keys with the scope "
        f"{stage.scope}"
    )
    if len(given) == len(others):
        return lack
    return f"{lack} (several keys of one owner count as one, and the version's own owner does not count)"


def enter(policy: ModelPolicy, model: str, number: int, name: str, facts: StageFacts) -> None:
    """Raise Conflict if a version does not meet a stage's requirements. Earlier stages are always allowed."""
    stage = stage_of(policy, model, name)
    if policy.rank(name) <= policy.rank(facts.stage):
        return
    if lacks := missing(policy, stage, facts):
        raise Conflict(
            f"Version {number} of model {model!r} cannot enter the stage {name}: {'; '.join(lacks)}. "
            f"{_next_step(policy, stage, facts, f'{model}@{number}')}",
            reason=REASON,
        )


def _next_step(policy: ModelPolicy, stage: Stage, facts: StageFacts, version: str) -> str:
    """Return the command for the first requirement that a version does not meet."""
    before = policy.rank(stage.name) - 1
    model, _, number = version.partition("@")
    if policy.rank(facts.stage) < before:
        return f"Move the version there: tidegate stage {version} --to {policy.stages[before - 1].name}"
    if stage.verified and facts.verification != "verified":
        return f"Verify the version: tidegate verify {model} --version {number}"
    if stage.checks and not facts.checks_met:
        return f"See the version's metadata: tidegate show {version}"
    return f"Approve the version: tidegate approve {version} --stage {stage.name}"


def changes_rules(before: RegistrySnapshot, changes: Sequence[Change]) -> bool:
    """Return True if a change alters ``stages`` or ``serve_from`` in a model's policy."""
    return any(
        change.policy.guards(before.policies.get(change.model, ModelPolicy()))
        for change in changes
        if isinstance(change, PutPolicy)
    )


def check(before: RegistrySnapshot, changes: Sequence[Change]) -> None:
    """Raise Conflict if a new Deployment runs a version whose stage does not allow it to serve."""
    policies = dict(before.policies)
    for change in changes:
        if isinstance(change, PutPolicy):
            policies[change.model] = change.policy
        if not isinstance(change, PutDeployment) or not change.created:
            continue
        model, number = change.stored.spec.model, change.stored.spec.version
        policy = policies.get(model)
        if policy is None or policy.serve_from is None:
            continue
        stage = before.staged.get((model, number))
        if policy.rank(stage) < policy.rank(policy.serve_from):
            there = f"is in the stage {stage}" if stage else "is in no stage"
            later = [each.name for each in policy.stages[policy.rank(policy.serve_from) - 1 :]]
            raise Conflict(
                f"Version {number} of model {model!r} {there}, and only versions in {names.quoted(later)} "
                f"may serve. See what the version needs: tidegate stage {model}@{number}. Then: tidegate "
                f"stage {model}@{number} --to {policy.serve_from}",
                reason=REASON,
            )
