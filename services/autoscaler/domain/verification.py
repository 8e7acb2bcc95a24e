"""Decide which scratch replicas start and end, and which versions are verified or rejected.

The functions do no I/O. A scratch replica loads one pending version, checks it and reports the result. The
name of its Deployment is ``scratch-<model>-<version>-``, which no other Deployment can have.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace

from services.autoscaler.domain.launcher import NoFreeGpu, OptionsRefused, Running, parse_replica
from services.autoscaler.domain.snapshot import Host, Policy
from tidegate.kernel.errors import TidegateError
from tidegate.kernel.protocol.models import Assignment, Deployment, Version
from tidegate.kernel.protocol.presence import ReplicaReport
from tidegate.kernel.protocol.verification import MAX_MESSAGE, ScratchOutcome, VerificationResult

# A version is rejected after ``DEATHS`` deaths of its model's process, or after ``INTERRUPTIONS`` failures of
# unknown cause. A failure of the platform never rejects it.
DEATHS, INTERRUPTIONS = 2, 3
AT_ONCE = 2  # more scratch replicas at the same time would slow down each other's measurements
PREFIX, SUFFIX = "scratch-", "-"
SILENT_S = 30.0
LONGEST_S = 2400.0  # a worker is ended after these seconds, if it ignored its own, shorter limits
# The first and the longest pause before the next try, in seconds.
BACKOFF_S, LONGEST_BACKOFF_S = 1.0, 60.0

Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Attempts:
    """The failed scratch replicas in one verification round of a version, counted by cause.

    ``deaths``: the model's process ended. ``interruptions``: the cause is not known, or no GPU was free.
    ``outages``: the platform failed. ``not_before`` is the earliest time of the next start.
    """

    round: int
    deaths: int = 0
    interruptions: int = 0
    outages: int = 0
    not_before: float = 0.0
    message: str = ""

    @property
    def tries(self) -> int:
        """Return how many scratch replicas failed."""
        return self.deaths + self.interruptions + self.outages


@dataclass(frozen=True, slots=True)
class Settle:
    """The result of a version's verification."""

    model: str
    number: int
    result: VerificationResult


@dataclass(frozen=True, slots=True)
class ScratchPlan:
    """The versions to verify now, the results, and the scratch replicas to end.

    ``kill`` has the name of each of these replicas and the cause of its end.
    """

    launch: tuple[Version, ...] = ()
    settle: tuple[Settle, ...] = ()
    kill: tuple[tuple[str, str], ...] = ()
    attempts: Mapping[Key, Attempts] = field(default_factory=dict)


def deployment_of_scratch(model: str, number: int) -> str:
    """Return the first part of the names of a version's scratch replicas."""
    return f"{PREFIX}{model}-{number}{SUFFIX}"


def scratch_of(deployment: str) -> Key | None:
    """Return the version to which a name from :func:`deployment_of_scratch` belongs; else None."""
    if not (deployment.startswith(PREFIX) and deployment.endswith(SUFFIX)):
        return None
    model, _, number = deployment[len(PREFIX) : -len(SUFFIX)].rpartition("-")
    return (model, int(number)) if model and number.isdecimal() else None


def is_scratch(worker: str) -> bool:
    """Return True if a worker was started as a scratch replica."""
    parsed = parse_replica(worker)
    return parsed is not None and scratch_of(parsed[0]) is not None


def fits(scratch: Assignment, assignment: Assignment) -> bool:
    """Return True if the scratch replica of a verified version can become the replica ``assignment``."""
    of, for_ = scratch.deployment, assignment.deployment
    same = (of.model, of.version, of.image, of.resources) == (
        for_.model,
        for_.version,
        for_.image,
        for_.resources,
    )
    return same and assignment.scratch is None


def plan(
    pending: Sequence[Version],
    running: Sequence[Running],
    reports: Mapping[str, ReplicaReport],
    attempts: Mapping[Key, Attempts],
    now: float,
    heard: Mapping[str, float] | None = None,
    reported: Container[str] = frozenset(),
) -> ScratchPlan:
    """Return the versions to verify now, the results, and the scratch replicas to end.

    ``running``: the scratch replicas. ``reports``: the heartbeats of workers.

    ``heard``: for each scratch replica, the time from which its silence counts. ``reported``: the scratch
    replicas that have sent a heartbeat so far.
    """
    wanted = {(version.model, version.number): version for version in pending}
    memory = {
        key: kept
        for key, version in wanted.items()
        if (kept := attempts.get(key, Attempts(0))).round == version.verification.round
    }
    settle, kill, busy = list[Settle](), list[tuple[str, str]](), set[Key]()
    for each in running:
        key = scratch_of(each.deployment)
        version = wanted.get(key) if key else None
        if key is None or version is None:
            kill.append((each.replica, "the verification of this version is no longer pending"))
            continue
        since = max(each.launched_at, (heard or {}).get(each.replica, 0.0))
        outcome = _outcome(
            each,
            reports.get(each.replica),
            version.verification.round,
            now,
            now - since,
            began=each.replica in reported or each.replica in reports,
        )
        if outcome is None:
            busy.add(key)
            continue
        kill.append((each.replica, outcome.kind))
        memory[key], result = _judged(memory.get(key, Attempts(outcome.round)), outcome, now)
        if result is not None:
            settle.append(Settle(*key, result))
            busy.add(key)
    free = max(0, AT_ONCE - len(busy))
    due = [
        version
        for key, version in sorted(wanted.items(), key=lambda item: item[1].created_at)
        if key not in busy and memory.get(key, Attempts(0)).not_before <= now
    ]
    return ScratchPlan(tuple(due[:free]), tuple(settle), tuple(kill), memory)


def after_failed_launch(
    version: Version, kept: Attempts | None, error: TidegateError, now: float
) -> tuple[Attempts, VerificationResult | None]:
    """Return the attempts including this failed launch, and the version's result if no try follows.

    If the launcher refuses the version's options, the version is rejected. If the machine has no free GPU in
    several tries, the version is skipped. A skipped version can serve. So a new version can still replace a
    version that uses the only GPU. After any other failure of the launcher, the version stays pending.
    """
    no_gpu = isinstance(error, NoFreeGpu)
    kind = "interrupted" if no_gpu else "rejected" if isinstance(error, OptionsRefused) else "unavailable"
    round_ = version.verification.round
    outcome = ScratchOutcome.model_validate(
        {"round": round_, "kind": kind, "message": error.message[:MAX_MESSAGE]}
    )
    memory, result = _judged(kept or Attempts(round_), outcome, now)
    if result is not None and no_gpu:
        result = result.model_copy(update={"state": "skipped"})
    return memory, result


def obstacle(deployment: Deployment, host: Host | None, policy: Policy, *, cordoned: bool) -> str:
    """Return why no scratch replica may start now; empty if it may."""
    if cordoned:
        return "the host is cordoned, so no scratch replica starts"
    needed = deployment.resources.memory_mb or policy.replica_memory_mb
    if host is None or host.available_mb is None:
        return ""
    free = host.available_mb - host.memory_mb * (1.0 - policy.host_memory)
    if needed <= free:
        return ""
    return f"the host has {max(0.0, free):,.0f} MiB free, and a scratch replica needs {needed:,} MiB"


def _outcome(
    running: Running,
    report: ReplicaReport | None,
    round_: int,
    now: float,
    silent_s: float,
    *,
    began: bool,
) -> ScratchOutcome | None:
    """Return how a scratch replica ended; None while it works. ``silent_s``: seconds without a heartbeat.

    ``began``: True if it has sent a heartbeat. Before the first heartbeat, no part of the model runs, so an
    unknown cause counts as a failure of the platform.
    """
    unknown = "interrupted" if began else "unavailable"
    if report is not None and report.scratch is not None:
        found = ScratchOutcome.model_validate(report.scratch)
        if found.round == round_:
            return found
        return ScratchOutcome(
            round=round_, kind="interrupted", message="the result belongs to an earlier verification"
        )
    if not running.alive:
        kind = "died" if running.out_of_memory else unknown
        why = "the memory limit was reached: " if running.out_of_memory else ""
        return ScratchOutcome.model_validate(
            {
                "round": round_,
                "kind": kind,
                "message": f"{why}{running.ending or 'the process of the scratch replica has ended'}",
            }
        )
    age = now - running.launched_at
    if age > LONGEST_S or (report is None and silent_s > SILENT_S):
        late = f"no result after {LONGEST_S:g} s" if age > LONGEST_S else f"no heartbeat for {SILENT_S:g} s"
        return ScratchOutcome.model_validate({"round": round_, "kind": unknown, "message": late})
    return None


def _judged(
    kept: Attempts, outcome: ScratchOutcome, now: float
) -> tuple[Attempts, VerificationResult | None]:
    """Return the attempts including this outcome, and the version's result.

    The result is None if another try follows.
    """
    if outcome.kind in ("verified", "rejected"):
        result = VerificationResult.model_validate(
            {"round": outcome.round, "state": outcome.kind, "message": outcome.message, "card": outcome.card}
        )
        return kept, result
    died = outcome.kind == "died"
    kept = replace(
        kept,
        deaths=kept.deaths + died,
        interruptions=kept.interruptions + (outcome.kind == "interrupted"),
        outages=kept.outages + (outcome.kind == "unavailable"),
        message=outcome.message,
    )
    pause_s = min(BACKOFF_S * 2.0 ** min(kept.tries - 1, 10), LONGEST_BACKOFF_S)
    kept = replace(kept, not_before=now + pause_s)
    if outcome.kind == "unavailable":
        return kept, None
    if kept.deaths < DEATHS and kept.interruptions < INTERRUPTIONS:
        return kept, None
    cause = "" if died else "no scratch replica reported a result: "
    message = f"After {kept.tries} tries: {cause}{outcome.message}"
    return kept, VerificationResult(round=outcome.round, state="rejected", message=message[:MAX_MESSAGE])
