"""Decide about one Deployment in one round: count failures, find the target, start and drain replicas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from services.autoscaler.domain import replica_health
from services.autoscaler.domain.cold_start import start_time
from services.autoscaler.domain.desired_state import DesiredStateIndex
from services.autoscaler.domain.launcher import fingerprint, parse_replica
from services.autoscaler.domain.llm_load import is_llm, measure_llm
from services.autoscaler.domain.load import measure, with_guess
from services.autoscaler.domain.memory import (
    DeploymentMemory,
    EndedReplica,
    Load,
    StartFailures,
    State,
    Target,
)
from services.autoscaler.domain.model_deaths import with_deaths
from services.autoscaler.domain.placement import to_drain, to_launch
from services.autoscaler.domain.replica_health import Verdict
from services.autoscaler.domain.rules import ReplicaCounts
from services.autoscaler.domain.shaping import moved
from services.autoscaler.domain.snapshot import (
    Action,
    Decision,
    Kill,
    Launch,
    Policy,
    Snapshot,
    describe,
)
from services.autoscaler.domain.target import Circumstances, effective_override, target
from tidegate.kernel.protocol.models import Deployment
from tidegate.kernel.protocol.presence import ReplicaReport

FORGET_SLOT_AFTER_S = 600.0
ENDED_KEPT = 5
# If the rule changes to or from one of `NOTABLE_RULES`, a decision is recorded even if the number of replicas
# is the same. The rule before the first round is "".
HOST_FULL = "host full"
NOTABLE_RULES = {"", "override", "demand unknown", "panic", "cost cap", "budget", "limited", HOST_FULL}


@dataclass(frozen=True, slots=True)
class DeploymentRound:
    """One Deployment in one round, with everything that its decisions depend on."""

    deployment: Deployment
    verdicts: list[Verdict]
    reports: list[ReplicaReport]
    snapshot: Snapshot
    known: DesiredStateIndex
    policy: Policy
    now: float

    def propose(self, state: State) -> Proposal:
        """Return a proposal with the target of this round. The host has not limited this target yet."""
        before = state.deployments.get(self.deployment.name) or self._first_memory(state)
        memory = self._with_configuration(before)
        memory = self._with_size(self._with_ends(memory, state))
        version = self.known.version_of(self.deployment)
        load, measured = measure(
            self.deployment.name,
            self.snapshot.gateways,
            self.snapshot.jobs,
            self.reports,
            memory.load,
            self.policy,
            self.now,
            self.deployment.instances,
            start_time(state, self.deployment.name) or 0.0,
        )
        load = replace(load, expected=self.snapshot.expected.get(self.deployment.name))
        if is_llm(version):
            llm, measured = measure_llm(
                self.deployment, self.snapshot.gateways, self.reports, measured, self.policy, self.now
            )
            load = replace(load, llm=llm)
        guessed = with_guess(load, version)
        around = self._around(state)
        found, memory = target(
            self.deployment, guessed, replace(memory, load=measured), around, self.policy, self.now
        )
        memory = replace(memory, rule=found.rule, seen=load, wanted=found)
        cause = found.rule if before.rule else "first round"
        return Proposal(self, before, memory, guessed, around.fleet, found, cause)

    def settle(
        self, proposal: Proposal, launches: Sequence[Launch], put_off: int
    ) -> tuple[list[Action], Decision | None, DeploymentMemory]:
        """Return the actions, the decision (None if not worth recording) and the ``DeploymentMemory``.

        The next round uses the ``DeploymentMemory``. ``launches``: the launches that are made now.
        ``put_off``: the number of launches that must wait.
        """
        before, found = proposal.before, proposal.target
        memory = replace(proposal.memory, put_off=put_off)
        drains = to_drain(self.verdicts, found.replicas, memory.fingerprint)
        actions = [*self._kills(), *launches, *drains]
        decision = None
        turned = found.rule != before.rule and bool({found.rule, before.rule} & NOTABLE_RULES)
        if actions or turned or found.replicas != before.target:
            decision = self._decision(before.target, found, proposal.load, memory, proposal.fleet, actions)
        return actions, decision, memory

    def launches(self, proposal: Proposal, generations: Mapping[tuple[str, int], int]) -> list[Launch]:
        """Return the launches for the target; empty if the host is cordoned or the version is unknown."""
        version = self.known.version_of(self.deployment)
        if version is None or self.snapshot.host in self.snapshot.cordoned:
            return []
        replicas, memory, cause = proposal.target.replicas, proposal.memory, proposal.cause
        return to_launch(
            self.deployment, version, self.verdicts, replicas, memory, generations, cause, self.now
        )

    def _first_memory(self, state: State) -> DeploymentMemory:
        """Return the first ``DeploymentMemory`` of a Deployment that is new to this process.

        The target in it is the number of replicas that run now. A Deployment that never ran gets at least one
        replica, even with a minimum of 0, to show that its model loads.
        """
        active = sum(v.active for v in self.verdicts)
        known = any(deployment == self.deployment.name for deployment, _ in state.generations)
        start = active if known or active else max(1, self.deployment.min_replicas)
        failed = max(
            (r for r in self.reports if r.state == "failed"),
            key=lambda r: r.generation,
            default=None,
        )
        start_failures = StartFailures()
        if failed is not None and not any(v.running.replica == failed.replica for v in self.verdicts):
            # The replica failed before this process started. Keep its message, and wait before the next
            # start.
            not_before = self.now + 2.0
            start_failures = StartFailures(
                1, not_before, self.now, replica_health.REASONS[replica_health.FAILED], failed.message
            )
        # Record the first target as a recommendation. So no replica is drained before one down window
        # (`down_window_s`) has passed.
        return DeploymentMemory(start, self.now, recommended=((self.now, start),), start=start_failures)

    def _with_configuration(self, memory: DeploymentMemory) -> DeploymentMemory:
        """Return ``memory``, adapted to the Deployment's current configuration.

        If the configuration has changed, forget the failed starts, the failures of replica slots, and the
        measured RAM of a replica.
        """
        current = fingerprint(self.deployment)
        if memory.fingerprint == current:
            return memory
        if not memory.fingerprint:
            return replace(memory, fingerprint=current)
        return replace(memory, fingerprint=current, start=StartFailures(), slots={}, replica_mb=0)

    def _with_size(self, memory: DeploymentMemory) -> DeploymentMemory:
        """Return ``memory`` with the highest RAM use (in MiB) that was measured for a ready replica.

        Only replicas of the current configuration count.
        """
        found = [
            v.running.memory_mb
            for v in self.verdicts
            if v.phase == "ready" and v.running.fingerprint == memory.fingerprint
        ]
        most = max(found, default=0)
        return memory if most <= memory.replica_mb else replace(memory, replica_mb=most)

    def _with_ends(self, memory: DeploymentMemory, state: State) -> DeploymentMemory:
        """Return ``memory`` with the failures of this round.

        Forget failed starts when a replica became ready after the last of them. Forget the failures of a
        replica slot ``FORGET_SLOT_AFTER_S`` seconds after its last failure.
        """
        ready = [
            state.replicas[v.running.replica].ready_at or 0.0 for v in self.verdicts if v.phase == "ready"
        ]
        if memory.start.failures and max(ready, default=0.0) > memory.start.last_failure:
            memory = replace(memory, start=StartFailures())
        recent = {s: m for s, m in memory.slots.items() if self.now - m.last_failure < FORGET_SLOT_AFTER_S}
        memory = replace(memory, slots=recent)
        for verdict in self.verdicts:
            ready_at = state.replicas[verdict.running.replica].ready_at
            if verdict.ended and verdict.ended != replica_health.DRAINED:
                end = EndedReplica(verdict.running.replica, verdict.ended, verdict.message, self.now)
                memory = replace(memory, ended=(end, *memory.ended)[:ENDED_KEPT])
            if verdict.ended and verdict.running.fingerprint == memory.fingerprint:
                memory = replica_health.note_end(memory, verdict, ready_at, self.policy, self.now)
        memory = replace(memory, ended=with_deaths(memory.ended, self.reports, ENDED_KEPT, self.now))
        for replica, message in self.snapshot.launch_failures.items():
            parsed = parse_replica(replica)
            if parsed and parsed[0] == self.deployment.name:
                memory = replica_health.failed_start(
                    memory, replica_health.NOT_LAUNCHED, message, self.policy, self.now
                )
        return memory

    def _around(self, state: State) -> Circumstances:
        name = self.deployment.name
        active = [v for v in self.verdicts if v.active]
        return Circumstances(
            ReplicaCounts(
                ready=sum(v.phase == "ready" for v in active),
                starting=sum(v.phase == "starting" for v in active),
                start_s=start_time(state, name) or 0.0,
            ),
            hint_at=self.now if name in self.known.awaited else self.snapshot.hints.get(name),
            override=effective_override(self.deployment, self.snapshot.overrides.get(name)),
            over_budget=self.snapshot.over_budget.get(name, ""),
            kept=name in self.known.kept,
        )

    def _kills(self) -> list[Action]:
        return [
            # The report of a failed replica is not deleted. Operators can read it until it expires.
            Kill(v.running.replica, v.ended, forget=v.ended != replica_health.FAILED)
            for v in self.verdicts
            if v.ended
        ]

    def _decision(
        self,
        before: int,
        target: Target,
        load: Load,
        memory: DeploymentMemory,
        fleet: ReplicaCounts,
        actions: list[Action],
    ) -> Decision:
        inputs: dict[str, Any] = {
            "demand": load.demand,
            "arrival_rate": load.arrival_rate,
            "ms_per_request": load.ms_per_request,
            "guessed": bool(load.guess),
            "batch": load.batch,
            "utilization": load.utilization,
            "gpu_utilization": load.gpu_utilization,
            "trend": load.trend,
            "expected": load.expected,
            "ready": fleet.ready,
            "starting": fleet.starting,
            "draining": sum(not v.ended and v.phase == "draining" for v in self.verdicts),
            "start_s": fleet.start_s,
            "min": target.low,
            "max": target.high,
            "idle_s": self.now - memory.last_active,
            "cordoned": self.snapshot.host in self.snapshot.cordoned,
            "needs": {term.rule: term.replicas for term in target.terms},
        }
        if load.llm is not None:
            inputs["llm"] = asdict(load.llm)
        if target.asked is not None and self.snapshot.room is not None:
            inputs["asked"], inputs["host"] = target.asked, asdict(self.snapshot.room)
        ends = [f"{v.running.replica}: {v.ended}: {v.message}" for v in self.verdicts if v.ended]
        reason = "; ".join([target.reason, *ends])
        return Decision(
            self.now,
            self.deployment.name,
            target.rule,
            reason,
            before,
            target.replicas,
            inputs,
            [describe(action) for action in actions],
        )


@dataclass(frozen=True, slots=True)
class Proposal:
    """The target of one Deployment in one round.

    At first, the host does not limit the target. :meth:`bounded` returns a proposal whose target the host
    limits.

    ``before``: the :class:`DeploymentMemory` after the last round. ``memory``: the one after this round.
    ``cause``: why new replicas are launched.
    """

    round: DeploymentRound
    before: DeploymentMemory
    memory: DeploymentMemory
    load: Load
    fleet: ReplicaCounts
    target: Target
    cause: str

    @property
    def name(self) -> str:
        """The Deployment's name."""
        return self.round.deployment.name

    @property
    def rolling(self) -> bool:
        """Return True while replicas of a former configuration are being replaced."""
        return any(v.active and v.running.fingerprint != self.memory.fingerprint for v in self.round.verdicts)

    def bounded(self, replicas: int, words: str) -> Proposal:
        """Return the proposal with its target lowered to ``replicas``: the host has room for no more.

        ``words`` explain this limit.
        """
        full = self.target
        reason = f"{full.reason}; {words}"
        found = replace(full, replicas=replicas, rule=HOST_FULL, reason=reason, asked=full.replicas)
        memory = replace(self.memory, target=self.before.target, moves=self.before.moves)
        memory = replace(moved(memory, replicas, self.round.now), rule=HOST_FULL, wanted=found)
        return replace(self, target=found, memory=memory)
