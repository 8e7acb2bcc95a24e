"""Decide what to do about one snapshot, and why. Pure: no clock, no I/O, no randomness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from services.autoscaler.domain import replica_health
from services.autoscaler.domain.deployment_round import DeploymentRound, Proposal
from services.autoscaler.domain.desired_state import DesiredStateIndex, index_of
from services.autoscaler.domain.host_bounds import HostBounds
from services.autoscaler.domain.launcher import Running, parse_replica
from services.autoscaler.domain.load import reports_by_deployment
from services.autoscaler.domain.memory import STARTS_KEPT, DeploymentMemory, ReplicaMemory, State
from services.autoscaler.domain.replica_health import ReplicaTimeouts, judge_all
from services.autoscaler.domain.snapshot import (
    Action,
    Decision,
    Drain,
    Kill,
    Launch,
    Plan,
    Policy,
    Snapshot,
    describe,
)
from services.autoscaler.domain.verification import is_scratch
from tidegate.kernel.protocol.presence import ReplicaReport


def decide(snapshot: Snapshot, policy: Policy, state: State, now: float) -> tuple[Plan, State]:
    """Return the plan for ``snapshot`` at ``now`` (seconds since the epoch), and the next state.

    The plan is empty while the desired state or the running replicas are not known. This function never
    raises an exception.
    """
    state = _notice(snapshot, state, now)
    if snapshot.desired_state is None or snapshot.running is None:
        return Plan(), state
    state = _adopt(snapshot.running, snapshot.reports, state, now)
    known = index_of(snapshot.desired_state)
    state = replace(state, first_starts=known.start_times(snapshot.desired_state.deployments))
    by_deployment: dict[str, list[Running]] = {}
    for running in snapshot.running:
        by_deployment.setdefault(running.deployment, []).append(running)
    proposals = _proposals(snapshot, known, by_deployment, policy, state, now)
    host = HostBounds.of(snapshot, proposals, policy, state, now)
    proposals = host.granted(proposals)
    actions: list[Action] = []
    decisions: list[Decision] = []
    memories: dict[str, DeploymentMemory] = {}
    launches = {each.name: each.round.launches(each, state.generations) for each in proposals}
    starts = host.admitted(launches, frozenset(each.name for each in proposals if each.rolling))
    for each in proposals:
        name, possible = each.name, launches[each.name]
        made = possible[: starts.get(name, 0)]
        done, decision, memories[name] = each.round.settle(each, made, len(possible) - len(made))
        actions += done
        decisions += [decision] if decision else []
    for name, deleted in by_deployment.items():
        if name in memories:
            continue
        done, decision = _retire(name, deleted, snapshot, state, policy, now)
        actions += done
        decisions += [decision] if decision else []
    state = replace(
        state,
        deployments=memories,
        generations=_generations(state, actions),
        # Record each launch now. The autoscaler can measure the start of a replica only if the state
        # contained the replica before the replica became ready.
        replicas={
            **state.replicas,
            **{a.replica: ReplicaMemory(now) for a in actions if isinstance(a, Launch)},
        },
    )
    return Plan(tuple(actions), tuple(decisions)), state


def _proposals(
    snapshot: Snapshot,
    known: DesiredStateIndex,
    running: Mapping[str, Sequence[Running]],
    policy: Policy,
    state: State,
    now: float,
) -> list[Proposal]:
    """Return a proposal for each Deployment of the desired state.

    ``running``: the replicas of each Deployment, by its name.
    """
    if snapshot.desired_state is None:
        return []
    reports = reports_by_deployment(snapshot.reports)
    found = []
    for deployment in snapshot.desired_state.deployments:
        name = deployment.name
        timeouts = ReplicaTimeouts(deployment.start_timeout_s, deployment.progress_timeout_s)
        verdicts = judge_all(running.get(name, ()), timeouts, snapshot, state, policy, now)
        round_ = DeploymentRound(deployment, verdicts, reports.get(name, []), snapshot, known, policy, now)
        found.append(round_.propose(state))
    return found


def _notice(snapshot: Snapshot, state: State, now: float) -> State:
    """Return ``state`` with the current ``readable_since`` and ``evidence_since``.

    ``readable_since``: since when the store has answered; None if it does not answer. ``evidence_since``:
    since when the store has had live heartbeats; None if it has none.
    """
    readable = snapshot.reports is not None
    # A failed worker's report stays after the worker has ended, so it does not count as a heartbeat.
    living = any(report.state != "failed" for report in (snapshot.reports or {}).values())
    heard = readable and bool(living or (snapshot.gateways and snapshot.gateways.reports))
    return replace(
        state,
        readable_since=(state.readable_since or now) if readable else None,
        evidence_since=(state.evidence_since or now) if heard else None,
    )


def _adopt(
    running: Sequence[Running],
    reports: Mapping[str, ReplicaReport] | None,
    state: State,
    now: float,
) -> State:
    """Return the state with the heartbeats, generations and start times of the running replicas."""
    replicas: dict[str, ReplicaMemory] = {}
    starts = dict(state.starts)
    generations = dict(state.generations)
    for each in running:
        memory = state.replicas.get(each.replica, ReplicaMemory(now))
        seen = replicas[each.replica] = replica_health.with_heartbeat(
            each, (reports or {}).get(each.replica), memory, now
        )
        ready = each.replica in state.replicas and seen.ready_at is not None and memory.ready_at is None
        # Do not measure the start of a replica that began as a scratch replica. Only a version's first
        # replica can begin so. Later starts take longer, so its time would be a wrong estimate of them.
        if ready and not is_scratch(each.worker):
            took = max(0.0, now - each.launched_at - seen.installing_s)
            starts[each.deployment] = (took, *starts.get(each.deployment, ()))[:STARTS_KEPT]
        _raise_generation(generations, each.deployment, each.slot, each.generation)
    # The report of a failed replica stays after the replica has ended. Count its generation too, so that no
    # later replica gets the same name.
    for name in reports or {}:
        if parsed := parse_replica(name):
            _raise_generation(generations, *parsed)
    return replace(state, replicas=replicas, generations=generations, starts=starts)


def _raise_generation(generations: dict[tuple[str, int], int], deployment: str, slot: int, seen: int) -> None:
    generations[deployment, slot] = max(generations.get((deployment, slot), 0), seen)


def _retire(
    name: str,
    running: list[Running],
    snapshot: Snapshot,
    state: State,
    policy: Policy,
    now: float,
) -> tuple[list[Action], Decision | None]:
    """Return the actions that end the replicas of a deleted Deployment, and the decision, if there is any."""
    no_timeouts = ReplicaTimeouts(float("inf"), float("inf"))
    verdicts = judge_all(running, no_timeouts, snapshot, state, policy, now)
    actions: list[Action] = [Kill(v.running.replica, v.ended) for v in verdicts if v.ended]
    actions += [Drain(v.running.replica, "deployment deleted") for v in verdicts if v.active]
    if not actions:
        return [], None
    words = [describe(action) for action in actions]
    before = sum(v.active for v in verdicts)
    return actions, Decision(now, name, "deleted", "the Deployment was deleted", before, 0, {}, words)


def _generations(state: State, actions: Sequence[Action]) -> dict[tuple[str, int], int]:
    launched = {(a.deployment.name, a.slot): a.generation for a in actions if isinstance(a, Launch)}
    return {**state.generations, **launched}
