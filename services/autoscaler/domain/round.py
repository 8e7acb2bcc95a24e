"""One Deployment in one round: bury the dead, find the target, start and drain towards it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from services.autoscaler.domain import healing
from services.autoscaler.domain.healing import Verdict
from services.autoscaler.domain.launcher import Running, fingerprint, parse_replica
from services.autoscaler.domain.load import measure, or_guessed
from services.autoscaler.domain.memory import DeploymentMemory, Load, StartTrouble, State
from services.autoscaler.domain.placement import to_drain, to_launch
from services.autoscaler.domain.snapshot import (
    Action,
    Decision,
    Kill,
    Launch,
    LocalOverride,
    Policy,
    Snapshot,
)
from services.autoscaler.domain.target import Circumstances, Target, target
from tidegate.protocol.models import Deployment, Intention, Version
from tidegate.protocol.presence import ReplicaReport

FORGET_SLOT_AFTER_S = 600.0
# Rules whose coming and going is worth a record even when the number stays; "" is the first round.
NOTABLE_RULES = {"", "override", "demand unknown"}


@dataclass(frozen=True, slots=True)
class Round:
    """One Deployment in one round."""

    deployment: Deployment
    verdicts: list[Verdict]
    reports: list[ReplicaReport]
    snapshot: Snapshot
    policy: Policy
    now: float

    def decide(self, state: State) -> tuple[list[Action], Decision | None, DeploymentMemory]:
        """Bury the dead, find the target, start and drain towards it."""
        before = state.deployments.get(self.deployment.name) or self._first_memory(state)
        memory = self._configured(before)
        memory = self._mourn(memory, state)
        load, measured = measure(
            self.deployment.name,
            self.snapshot.gateways,
            self.reports,
            memory.load,
            self.policy,
            self.now,
        )
        reckoned = or_guessed(load, version_of(self.snapshot.intention, self.deployment))
        wanted, memory = target(
            self.deployment,
            reckoned,
            replace(memory, load=measured),
            self._around(),
            self.policy,
            self.now,
        )
        memory = replace(memory, rule=wanted.rule, seen=load)
        cause = wanted.rule if before.rule else "first look"
        actions = [*self._kills(), *self._moves(wanted, memory, state.generations, cause)]
        decision = None
        turned = wanted.rule != before.rule and bool({wanted.rule, before.rule} & NOTABLE_RULES)
        if actions or turned or wanted.replicas != before.target:
            decision = self._decision(before.target, wanted, reckoned, memory, actions)
        return actions, decision, memory

    def _first_memory(self, state: State) -> DeploymentMemory:
        """A Deployment not seen before by this process: adopt what runs. One that never ran starts
        once even with a minimum of 0: that proves that it loads, and nothing waits for it yet."""
        active = sum(v.active for v in self.verdicts)
        known = any(deployment == self.deployment.name for deployment, _ in state.generations)
        start = active if known or active else max(1, self.deployment.min_replicas)
        failed = max(
            (r for r in self.reports if r.state == "failed"),
            key=lambda r: r.generation,
            default=None,
        )
        trouble = StartTrouble()
        if failed is not None and not any(v.running.replica == failed.replica for v in self.verdicts):
            # It failed before this process came: its message and the patience it asks for are kept.
            again = self.now + 2.0
            trouble = StartTrouble(1, again, self.now, healing.REASONS[healing.FAILED], failed.message)
        # What runs was needed a moment ago: it counts for a whole window.
        return DeploymentMemory(start, self.now, recommended=((self.now, start),), start=trouble)

    def _configured(self, memory: DeploymentMemory) -> DeploymentMemory:
        """A changed configuration gets its chance at once, whatever became of the last one."""
        current = fingerprint(self.deployment)
        if memory.fingerprint == current:
            return memory
        if not memory.fingerprint:
            return replace(memory, fingerprint=current)
        return replace(memory, fingerprint=current, start=StartTrouble(), slots={})

    def _mourn(self, memory: DeploymentMemory, state: State) -> DeploymentMemory:
        """What this round's ends, and starts that succeeded, mean for the next starts."""
        ready = [
            state.replicas[v.running.replica].ready_at or 0.0 for v in self.verdicts if v.phase == "ready"
        ]
        if memory.start.failures and max(ready, default=0.0) > memory.start.last_failure:
            memory = replace(memory, start=StartTrouble())
        recent = {s: m for s, m in memory.slots.items() if self.now - m.last_failure < FORGET_SLOT_AFTER_S}
        memory = replace(memory, slots=recent)
        for verdict in self.verdicts:
            ready_at = state.replicas[verdict.running.replica].ready_at
            if verdict.ended and verdict.running.fingerprint == memory.fingerprint:
                memory = healing.note_end(memory, verdict, ready_at, self.policy, self.now)
        for replica, message in self.snapshot.launch_failures.items():
            parsed = parse_replica(replica)
            if parsed and parsed[0] == self.deployment.name:
                memory = healing.failed_start(memory, healing.NOT_LAUNCHED, message, self.policy, self.now)
        return memory

    def _around(self) -> Circumstances:
        name = self.deployment.name
        active = [v for v in self.verdicts if v.active]
        return Circumstances(
            ready=sum(v.phase == "ready" for v in active),
            starting=sum(v.phase == "starting" for v in active),
            hint_at=self.now if awaited(self.snapshot.intention, name) else self.snapshot.hints.get(name),
            override=effective_override(self.deployment, self.snapshot.overrides.get(name)),
        )

    def _kills(self) -> list[Action]:
        return [
            # A failure's report stays until it expires: people read it after the process is gone.
            Kill(v.running.replica, v.ended, forget=v.ended != healing.FAILED)
            for v in self.verdicts
            if v.ended
        ]

    def _moves(
        self,
        wanted: Target,
        memory: DeploymentMemory,
        generations: Mapping[tuple[str, int], int],
        cause: str,
    ) -> list[Action]:
        drains = to_drain(self.verdicts, wanted.replicas, memory.fingerprint)
        version = version_of(self.snapshot.intention, self.deployment)
        launches: list[Launch] = []
        if version is not None:
            launches = to_launch(
                self.deployment,
                version,
                self.verdicts,
                wanted.replicas,
                memory,
                generations,
                cause,
                self.now,
            )
        return [*launches, *drains]

    def _decision(
        self,
        before: int,
        wanted: Target,
        load: Load,
        memory: DeploymentMemory,
        actions: list[Action],
    ) -> Decision:
        inputs: dict[str, Any] = {
            "demand": load.demand,
            "arrival_rate": load.arrival_rate,
            "ms_per_request": load.ms_per_request,
            "guessed": bool(load.guess),
            "batch": load.batch,
            "ready": sum(v.active and v.phase == "ready" for v in self.verdicts),
            "starting": sum(v.active and v.phase == "starting" for v in self.verdicts),
            "draining": sum(not v.ended and v.phase == "draining" for v in self.verdicts),
            "min": self.deployment.min_replicas,
            "max": self.deployment.max_replicas,
            "idle_s": self.now - memory.last_active,
        }
        told = [f"{v.running.replica}: {v.ended}: {v.message}" for v in self.verdicts if v.ended]
        reason = "; ".join([wanted.reason, *told])
        return Decision(
            self.now,
            self.deployment.name,
            wanted.rule,
            reason,
            before,
            wanted.replicas,
            inputs,
            [in_words(action) for action in actions],
        )


def awaited(intention: Intention | None, deployment: str) -> bool:
    """Whether a roll-over waits for the Deployment: traffic moves when every target has a ready replica."""
    rolling = [endpoint for endpoint in intention.endpoints if endpoint.previous] if intention else []
    targets = [target for endpoint in rolling for target in endpoint.targets if target.weight]
    return any(target.deployment == deployment for target in targets)


def version_of(intention: Intention | None, deployment: Deployment) -> Version | None:
    """The Version that a Deployment runs; None when the registry did not list it."""
    versions = intention.versions if intention else []
    return next(
        (v for v in versions if (v.model, v.number) == (deployment.model, deployment.version)),
        None,
    )


def effective_override(deployment: Deployment, local: LocalOverride | None) -> LocalOverride | None:
    """The override that counts: one given here while the registry was away, else the registry's."""
    if local is not None:
        return local
    if deployment.override is None:
        return None
    expires = deployment.override.expires_at
    return LocalOverride(deployment.override.replicas, expires.timestamp() if expires else None)


def verdicts_of(
    running: list[Running],
    start_timeout_s: float,
    snapshot: Snapshot,
    state: State,
    policy: Policy,
    now: float,
) -> list[Verdict]:
    """How each of ``running`` is; ``state`` has this round's heartbeats already."""
    reports = snapshot.reports or {}
    return [
        healing.judge(
            each,
            reports.get(each.replica),
            state.replicas[each.replica],
            state,
            start_timeout_s,
            policy,
            now,
        )
        for each in running
    ]


def in_words(action: Action) -> str:
    """An action as one line for people."""
    return f"{type(action).__name__.lower()} {action.replica} ({action.cause})"
