"""Whether a replica is well, and what its end means for the next one.

Nothing here trusts silence: a heartbeat that is missing counts only while the store answers and
somebody else's reports are in it, so a store that is down or was restarted empty kills nobody.
"""

from __future__ import annotations

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
from services.autoscaler.domain.snapshot import Policy
from tidegate.kernel.protocol.presence import ReplicaReport

# Causes of an end. The first is an orderly one.
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
    """How long a Deployment's replicas may take (seconds): to be ready, and to finish some of their work.

    ``progress_s`` None: the policy's time, and not for those that hold jobs or streams.
    """

    start_s: float
    progress_s: float | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """A replica's phase, or the cause of its end with a message for people.

    ``reported`` False: there is no heartbeat of it now, so its phase is what was last known.
    """

    running: Running
    phase: Phase
    ended: str = ""
    message: str = ""
    inflight: int = 0
    reported: bool = False

    @property
    def active(self) -> bool:
        """Whether it counts as one that serves or soon will."""
        return not self.ended and self.phase != "draining"


def look(running: Running, report: ReplicaReport | None, memory: ReplicaMemory, now: float) -> ReplicaMemory:
    """The memory of a replica with this round's heartbeat."""
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
    patience: ReplicaTimeouts,
    policy: Policy,
    now: float,
) -> Verdict:
    """How a replica is; ``memory`` is that of :func:`look`."""
    phase = phase_of(memory)
    inflight = report.inflight if report else 0
    failed = report is not None and report.state == "failed"
    told = report.message.strip("; \n") if report is not None and failed else ""
    if not running.alive:
        if phase == "draining":
            return Verdict(running, phase, DRAINED, "it was drained: it finished its work and exited")
        message = told or running.ending or memory.message or "the worker's process is gone"
        cause = OUT_OF_MEMORY if running.out_of_memory else FAILED if failed else DIED
        return Verdict(running, phase, cause, message)
    if failed:
        return Verdict(
            running,
            phase,
            FAILED,
            told or "the worker reports a failure without a message",
        )
    if memory.draining_since is not None:
        overdue = now - memory.draining_since > running.drain_limit_s + policy.drain_grace_s
        message = f"it did not finish within {running.drain_limit_s:g} s of being drained" if overdue else ""
        return Verdict(running, phase, DRAIN_OVERDUE if overdue else "", message, inflight)
    start_s = patience.start_s + memory.installing_s
    if phase == "starting" and _start_overdue(running, state, start_s, policy, now):
        last = f" Its last message: {memory.message}" if memory.message else ""
        return Verdict(
            running,
            phase,
            START_TIMEOUT,
            f"not ready after {patience.start_s:g} s.{last}",
        )
    if phase == "ready" and (stuck := _stuck(report, memory, state, patience, policy, now)):
        return Verdict(running, phase, STUCK, stuck, inflight)
    return Verdict(running, phase, inflight=inflight, reported=report is not None)


def phase_of(memory: ReplicaMemory | None) -> Phase:
    """The phase of a replica; None: nothing was heard of it yet."""
    if memory is None:
        return "starting"
    if memory.draining_since is not None:
        return "draining"
    return "starting" if memory.ready_at is None else "ready"


def _start_overdue(running: Running, state: State, limit: float, policy: Policy, now: float) -> bool:
    # A replica may be ready while the store, and so its heartbeat, was away.
    if state.readable_since is None or now - state.readable_since < policy.reports_return_s:
        return False
    return now - running.launched_at > limit + policy.start_grace_s


def _stuck(
    report: ReplicaReport | None,
    memory: ReplicaMemory,
    state: State,
    patience: ReplicaTimeouts,
    policy: Policy,
    now: float,
) -> str:
    """Why a ready replica counts as stuck; empty: it does not."""
    if state.evidence_since is None or memory.last_report is None:
        return ""
    if now - max(memory.last_report, state.evidence_since) > policy.stuck_after_s:
        return f"no heartbeat for {policy.stuck_after_s:g} s"
    if report is None or (patience.progress_s is None and _may_be_long(report)):
        return ""
    limit = patience.progress_s or policy.progress_timeout_s
    # The worker ends a model that is silent for so long by itself, and then says why.
    if now - memory.progress_at <= limit + policy.start_grace_s:
        return ""
    return (
        f"it sends heartbeats, but none of its {counted(report.inflight, 'request')} finished for {limit:g} s"
    )


def _may_be_long(report: ReplicaReport) -> bool:
    return report.jobs > 0 or bool((report.signature or {}).get("decoupled"))


def note_end(
    memory: DeploymentMemory, verdict: Verdict, ready_at: float | None, policy: Policy, now: float
) -> DeploymentMemory:
    """The Deployment's memory after one of its replicas ended: when the next may start.

    A replica that had been ready is replaced at once the first time, then after 1, 2, 4.. s, counted
    by slot. A start that fails is a matter of the version: counted for the Deployment, and a model
    that does not load is never retried at once.
    """
    if verdict.ended in {DRAINED, DRAIN_OVERDUE}:
        return memory
    if ready_at is None:
        # Replicas started together fail together: that is one failure.
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
    """The Deployment's memory after one more start that came to nothing, for the reason in ``ended``."""
    failures = memory.start.failures + 1
    patience = failures - 1 if ended == DIED else failures
    not_before = now + _backoff(patience, policy)
    trouble = StartFailures(failures, not_before, now, REASONS.get(ended, "StartFailed"), message)
    return replace(memory, start=trouble)


def _backoff(failures: int, policy: Policy) -> float:
    """Seconds to wait after so many failures in a row: 0, 1, 2, 4.. up to the policy's limit."""
    return 0.0 if failures < 1 else float(min(policy.backoff_max_s, 2.0 ** min(failures - 1, 16)))
