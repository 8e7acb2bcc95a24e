"""Report models whose process died, although their replica still runs."""

from __future__ import annotations

from collections.abc import Iterable

from services.autoscaler.domain.memory import EndedReplica
from tidegate.kernel.protocol.deployment_status import Condition
from tidegate.kernel.protocol.presence import ModelDeath, ReplicaReport

MODEL_DIED = "model died"
# After this many deaths of its model in a row, a Deployment counts as crash-looping.
REPEATED = 3
# A model's process that lives longer than this many seconds counts as healthy. Then the worker counts the
# deaths from zero again.
QUIET_S = 60.0
REMEMBERED_S = 600.0


def starts_again(report: ReplicaReport | None) -> bool:
    """Return True if a replica is loading its model again after the model died."""
    return report is not None and report.state == "starting" and report.death is not None


def with_deaths(
    ended: tuple[EndedReplica, ...], reports: Iterable[ReplicaReport], kept: int, now: float
) -> tuple[EndedReplica, ...]:
    """Return ``ended`` with the last death of each replica's model, newest failure first.

    Deaths that are older than ``REMEMBERED_S`` seconds are not added. If there are more than ``kept``
    failures, the oldest are dropped.
    """
    for report in reports:
        death = report.death
        if death is None or now - death.at > REMEMBERED_S:
            continue
        entry = EndedReplica(report.replica, MODEL_DIED, describe(death), death.at)
        if entry in ended:
            continue
        others = [e for e in ended if (e.replica, e.cause) != (report.replica, MODEL_DIED)]
        ended = tuple(sorted([entry, *others], key=lambda end: -end.at)[:kept])
    return ended


def describe(death: ModelDeath) -> str:
    """Return how the model's process died, and how often in a row."""
    return f"{death.words}, {death.in_a_row} times in a row" if death.in_a_row > 1 else death.words


def unhealthy(deployment: str, reports: Iterable[ReplicaReport], now: float) -> Condition | None:
    """Return the condition that says that a Deployment's model dies; None if this is not so.

    A death counts while the replica loads the model again. ``REPEATED`` or more deaths in a row also count
    for ``QUIET_S`` seconds after the last of them.
    """
    found = [
        (report, report.death)
        for report in reports
        if report.death is not None and (starts_again(report) or _repeats(report.death, now))
    ]
    if not found:
        return None
    report, death = max(found, key=lambda each: (each[1].in_a_row, each[1].at))
    again = f"the next start is in {max(0.0, death.next_start_at - now):.0f} s"
    what = again if starts_again(report) else "the replica serves again"
    text = f"{describe(death)} at {report.replica}, last {max(0.0, now - death.at):.0f} s ago; {what}"
    looping = death.in_a_row >= REPEATED
    return Condition(
        type="Healthy",
        ok=False,
        reason="CrashLoop" if looping else "ModelDied",
        message=f"{text}. {_next_step(deployment, death)}" if looping else text,
        at=now,
    )


def _repeats(death: ModelDeath, now: float) -> bool:
    return death.in_a_row >= REPEATED and now - death.at < QUIET_S


def _next_step(deployment: str, death: ModelDeath) -> str:
    step = f"See the last log lines: `tidegate logs {deployment}`"
    if "out of memory" in death.words:
        return f"{step}. If the model needs more memory, deploy it with a larger `--resource memory_mb=...`"
    return step
