"""Decide whether a replica is healthy, and when its successor may start.

A missing heartbeat counts only while the store answers and has other heartbeats. So an outage of the store,
or its restart without data, does not end any replica.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from services.autoscaler.domain.launcher import Running
from services.autoscaler.domain.memory import (
    DeploymentMemory,
    Phase,
    ReplicaMemory,
    SlotMemory,
    StartFailures,
    State,
)
from services.autoscaler.domain.plural import counted
from services.autoscaler.domain.snapshot import Policy, Snapshot
from tidegate.kernel.protocol.presence import ReplicaReport

# The causes of a replica's end. ``DRAINED`` is no failure. ``DRAIN_OVERDUE`` is shown as a failure, but it
# delays no start.
DRAINED = "drained"
DIED = "died"
FAILED = "failed"
START_TIMEOUT = "start timeout"
STUCK = "stuck"
DRAIN_OVERDUE = "drain overdue"
OUT_OF_MEMORY = "out of memory"
NOT_LAUNCHED = "launch failed"

REASONS = {
    FAILED: "LoadFailed",
    START_TIMEOUT: "StartTimeout",
    OUT_OF_MEMORY: "OutOfMemory",
    NOT_LAUNCHED: "LaunchFailed",
}


@dataclass(frozen=True, slots=True)
class ReplicaTimeouts:
    """The time limits of a Deployment's replicas, in seconds.

    ``start_s``: the longest time until a replica is ready. ``progress_s``: the longest time in which a
    replica with requests finishes none.

    If ``progress_s`` is None, the policy's limit applies. That limit does not apply to replicas that run
    jobs, nor to replicas whose model can stream.
    """

    start_s: float
    progress_s: float | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict on a replica: its phase, or the cause of its end with a message.

    ``reported``: True if an active replica has a heartbeat now. Without a heartbeat, its phase is the last
    known one. ``inflight``: the number of requests that it works on, plus the number of sequences that it
    keeps.
    """

    running: Running
    phase: Phase
    ended: str = ""
    message: str = ""
    inflight: int = 0
    reported: bool = False

    @property
    def active(self) -> bool:
        """Return True if the replica serves, or will serve soon."""
        return not self.ended and self.phase != "draining"


def with_heartbeat(
    running: Running, report: ReplicaReport | None, memory: ReplicaMemory, now: float
) -> ReplicaMemory:
    """Return a replica's ``memory``, updated with the heartbeat of this round."""
    draining = running.draining_since or memory.draining_since
    if report is None:
        return replace(memory, draining_since=draining)
    if report.state == "draining":
        draining = draining or now
    done = (report.completed + report.failed, report.busy_ms)
    moved = done != memory.progress or not report.inflight or report.state != "ready"
    return replace(
        memory,
        last_report=now,
        ready_at=memory.ready_at or (now if report.state == "ready" else None),
        draining_since=draining,
        message=report.message or memory.message,
        installing_s=report.phases_ms.get("environment", 0.0) / 1000.0,
        progress=done,
        progress_at=now if moved or not memory.progress_at else memory.progress_at,
    )


def judge(
    running: Running,
    report: ReplicaReport | None,
    memory: ReplicaMemory,
    state: State,
    timeouts: ReplicaTimeouts,
    policy: Policy,
    now: float,
) -> Verdict:
    """Return the verdict on a replica; ``memory`` is the result of :func:`with_heartbeat`."""
    phase = phase_of(memory)
    inflight = report.inflight + report.sequences if report else 0
    failed = report is not None and report.state == "failed"
    failure = report.message.strip("; \n") if report is not None and failed else ""
    if not running.alive:
        return _dead(running, phase, memory, failure if failed else None)
    if failed:
        return Verdict(running, phase, FAILED, failure or "the worker reports a failure without a message")
    if memory.draining_since is not None:
        overdue = now - memory.draining_since > running.drain_limit_s + policy.drain_grace_s
        message = f"the replica did not finish its work within {running.drain_limit_s:g} s" if overdue else ""
        return Verdict(running, phase, DRAIN_OVERDUE if overdue else "", message, inflight)
    start_s = timeouts.start_s + memory.installing_s
    if phase == "starting" and _start_overdue(running, state, start_s, policy, now):
        last = f" Its last message: {memory.message}" if memory.message else ""
        return Verdict(running, phase, START_TIMEOUT, f"not ready after {timeouts.start_s:g} s.{last}")
    if phase == "ready" and (stuck := _stuck(report, memory, state, timeouts, policy, now)):
        return Verdict(running, phase, STUCK, stuck, inflight)
    return Verdict(running, phase, inflight=inflight, reported=report is not None)


def _dead(running: Running, phase: Phase, memory: ReplicaMemory, failure: str | None) -> Verdict:
    """Return the verdict on a dead worker. ``failure`` is the failure that it reported, or None."""
    if phase == "draining":
        return Verdict(running, phase, DRAINED, "the replica was drained: it finished its work and exited")
    message = failure or running.ending or memory.message or "the worker's process has ended"
    cause = OUT_OF_MEMORY if running.out_of_memory else DIED if failure is None else FAILED
    return Verdict(running, phase, cause, message)


def judge_all(
    running: Sequence[Running],
    timeouts: ReplicaTimeouts,
    snapshot: Snapshot,
    state: State,
    policy: Policy,
    now: float,
) -> list[Verdict]:
    """Return the verdict on each replica. ``state`` already has the heartbeats of this round."""
    reports = snapshot.reports or {}
    return [
        judge(
            each,
            reports.get(each.replica),
            state.replicas[each.replica],
            state,
            timeouts,
            policy,
            now,
        )
        for each in running
    ]


def phase_of(memory: ReplicaMemory | None) -> Phase:
    """Return the phase of a replica. ``memory`` is None if no round has seen the replica yet."""
    if memory is None:
        return "starting"
    if memory.draining_since is not None:
        return "draining"
    return "starting" if memory.ready_at is None else "ready"


def _start_overdue(running: Running, state: State, limit: float, policy: Policy, now: float) -> bool:
    # The replica may have become ready while the store did not answer. So wait until its next heartbeat can
    # arrive.
    if state.readable_since is None or now - state.readable_since < policy.reports_return_s:
        return False
    return now - running.launched_at > limit + policy.start_grace_s


def _stuck(
    report: ReplicaReport | None,
    memory: ReplicaMemory,
    state: State,
    timeouts: ReplicaTimeouts,
    policy: Policy,
    now: float,
) -> str:
    """Return why a ready replica counts as stuck; empty if it does not."""
    if state.evidence_since is None or memory.last_report is None:
        return ""
    if now - max(memory.last_report, state.evidence_since) > policy.stuck_after_s:
        return f"no heartbeat for {policy.stuck_after_s:g} s"
    if report is None or (timeouts.progress_s is None and _may_be_long(report)):
        return ""
    limit = timeouts.progress_s or policy.progress_timeout_s
    # The worker has the same limit. It ends a model that hangs, and then it reports the reason. Wait a little
    # longer for this report.
    if now - memory.progress_at <= limit + policy.start_grace_s:
        return ""
    return (
        f"the replica sends heartbeats, but finished none of its {counted(report.inflight, 'request')} in "
        f"{limit:g} s"
    )


def _may_be_long(report: ReplicaReport) -> bool:
    return report.jobs > 0 or bool((report.signature or {}).get("decoupled"))


def note_end(
    memory: DeploymentMemory, verdict: Verdict, ready_at: float | None, policy: Policy, now: float
) -> DeploymentMemory:
    """Return the Deployment's ``memory`` after a replica ended, with the time of the next start.

    When a replica that was ready fails for the first time, it is replaced immediately. After further failures
    in its slot, the next start waits 1, 2, 4 .. s. Failed starts count for the whole Deployment, because they
    depend on the version. A model that does not load is never retried immediately.
    """
    if verdict.ended in {DRAINED, DRAIN_OVERDUE}:
        return memory
    if ready_at is None:
        # The failures of replicas that were started together count as one failure.
        if memory.start.failures and verdict.running.launched_at <= memory.start.last_failure:
            return memory
        return failed_start(memory, verdict.ended, verdict.message, policy, now)
    slot = verdict.running.slot
    before = memory.slots.get(slot, SlotMemory())
    failures = 1 if now - ready_at >= policy.stable_after_s else before.failures + 1
    after = SlotMemory(failures, now + _backoff(failures - 1, policy), now, verdict.message)
    return replace(memory, slots={**memory.slots, slot: after})


def failed_start(
    memory: DeploymentMemory, ended: str, message: str, policy: Policy, now: float
) -> DeploymentMemory:
    """Return the Deployment's ``memory`` after another failed start, with the cause ``ended``."""
    failures = memory.start.failures + 1
    steps = failures - 1 if ended == DIED else failures
    not_before = now + _backoff(steps, policy)
    start = StartFailures(failures, not_before, now, REASONS.get(ended, "StartFailed"), message)
    return replace(memory, start=start)


def _backoff(failures: int, policy: Policy) -> float:
    """Return the seconds to wait after ``failures`` failures in a row: 0, 1, 2, 4 .. up to a limit.

    ``policy.backoff_max_s`` is this limit.
    """
    return 0.0 if failures < 1 else float(min(policy.backoff_max_s, 2.0 ** min(failures - 1, 16)))
