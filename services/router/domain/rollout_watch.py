"""Watch one canary: judge the answers of each tick, and keep the evidence. Pure.

A tick is a short period. The gateways report total counts of answers. Each tick has the counts since the
previous one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from services.router.domain import canary
from services.router.domain.canary import CanaryDecision, CanaryPolicy, CanaryState
from services.router.domain.canary_health import CanaryHealth
from services.router.domain.evidence import Evidence, Tick
from services.router.domain.quality import Limit, Outcomes, QualityWatch
from services.router.domain.replica_seconds import Reading, readings, stalled, tick_of
from tidegate.kernel.protocol.feedback import FeedbackRecord
from tidegate.kernel.protocol.latency_buckets import COUNT, upper_s
from tidegate.kernel.protocol.models import Rollout
from tidegate.kernel.protocol.presence import GatewayReport, ReplicaReport, VariantCounts

# The baseline's percentiles are computed from this many answers and do not change afterwards.
FREEZE_AT = 500
# Seconds between two points of the history (POINT_S), and how many points are kept (POINTS_KEPT).
POINT_S = 5.0
POINTS_KEPT = 720


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The latency buckets that contain the baseline's 90th and 99th percentiles (``p90``, ``p99``).

    An answer in a bucket after ``p90`` is slow. An answer in a bucket after ``p99`` is very slow.
    """

    p90: int
    p99: int


@dataclass(frozen=True, slots=True)
class Point:
    """A point of a rollout's chart. ``share``: the canary's share of the traffic in percent.

    The counts cover the time from ``at`` to the next point. ``e_worse``: the strength of the evidence that
    the canary is worse (an e-value).
    """

    at: float
    share: int
    canary: int
    base: int
    canary_errors: int
    base_errors: int
    e_worse: float


@dataclass(slots=True)
class RolloutWatch:
    """The evidence of one rollout. ``seen``: the gateways' last totals, by process and Deployment."""

    id: str
    state: CanaryState = field(default_factory=CanaryState)
    seen: dict[str, VariantCounts] = field(default_factory=dict)
    base_times: list[int] = field(default_factory=lambda: [0] * COUNT)
    thresholds: Thresholds | None = None
    points: list[Point] = field(default_factory=list)
    fresh: bool = True
    quality: QualityWatch = field(default_factory=QualityWatch)
    replicas: dict[str, Reading] = field(default_factory=dict)
    # These two values are from the last call of :meth:`observe`. They are not stored.
    health: CanaryHealth = canary.HEALTHY
    samples: int = 0

    def observe(
        self,
        endpoint: str,
        rollout: Rollout,
        reports: Iterable[GatewayReport],
        now: float,
        health: CanaryHealth = canary.HEALTHY,
        feedback: Iterable[FeedbackRecord] = (),
        replicas: Sequence[ReplicaReport] = (),
    ) -> CanaryDecision:
        """Add the gateways' totals, the replicas' reports and new feedback, and decide about the canary.

        ``now``: seconds since the epoch.
        """
        self.health = health
        canary_new, base_new = self._new_counts(endpoint, rollout.deployment, reports)
        self._learn(base_new)
        ticks = self._ticks(canary_new, base_new)
        if (stalls := self._stalls(rollout, replicas)) is not None:
            ticks["stalled" + canary.SECONDS] = stalls
        if rollout.options.metric is not None:
            reported = self.quality.take(endpoint, rollout, feedback)
            ticks |= {"quality": reported} if reported is not None else {}
        requests = sum(canary_new.times) + canary_new.failed
        state = replace(self.state, step=rollout.step, since=rollout.since, phase=_phase(rollout))
        if state.step != self.state.step:
            state = replace(state, samples=0)
        self.samples = state.samples + requests
        decision = canary.judge(
            policy_of(rollout), state, ticks, requests, now, health, self.unjudged(rollout)
        )
        self._note(rollout, decision, canary_new, base_new, now)
        self.state = decision.state
        return decision

    def unjudged(self, rollout: Rollout) -> str:
        """Return what feedback is still needed to judge outcomes, as text; empty if there is enough."""
        return self.quality.missing() if rollout.options.metric is not None else ""

    def undo(self, rollout: Rollout) -> None:
        """Discard the last verdict, because the registry did not accept it. Keep the evidence."""
        self.state = replace(
            self.state, step=rollout.step, phase=_phase(rollout), since=rollout.since, samples=self.samples
        )

    def _new_counts(
        self, endpoint: str, deployment: str, reports: Iterable[GatewayReport]
    ) -> tuple[VariantCounts, VariantCounts]:
        """Return the counts since this method's last call: the canary's, and those of other Deployments."""
        canary_new, base_new = _nothing(), _nothing()
        for report in reports:
            for name, total in report.traffic.get(endpoint, {}).items():
                key = f"{report.incarnation} {name}"
                before = self.seen.get(key, total if self.fresh else _nothing())
                self.seen[key] = total
                into = canary_new if name == deployment else base_new
                into.failed += max(0, total.failed - before.failed)
                if total.times != before.times and len(total.times) == COUNT:
                    rows = zip(into.times, total.times, before.times, strict=True)
                    into.times = [sum_ + new - old if new > old else sum_ for sum_, new, old in rows]
        self.fresh = False
        return canary_new, base_new

    def _learn(self, base: VariantCounts) -> None:
        """Count the baseline's latencies. Set the thresholds when ``FREEZE_AT`` of them are counted.

        Afterwards, the thresholds do not change.
        """
        if self.thresholds is not None:
            return
        self.base_times = [a + b for a, b in zip(self.base_times, base.times, strict=True)]
        if sum(self.base_times) >= FREEZE_AT:
            self.thresholds = Thresholds(_quantile(self.base_times, 0.9), _quantile(self.base_times, 0.99))

    def _ticks(self, canary_new: VariantCounts, base_new: VariantCounts) -> dict[str, Tick]:
        answered = sum(canary_new.times), sum(base_new.times)
        ticks = {
            "errors": Tick(
                answered[0] + canary_new.failed, canary_new.failed,
                answered[1] + base_new.failed, base_new.failed,
            )
        }  # fmt: skip
        if self.thresholds is not None:
            for metric, bucket in (("slow", self.thresholds.p90), ("very_slow", self.thresholds.p99)):
                slow = sum(canary_new.times[bucket + 1 :]), sum(base_new.times[bucket + 1 :])
                ticks[metric] = Tick(answered[0], slow[0], answered[1], slow[1])
                if all(answered):
                    parts = slow[0] / answered[0], slow[1] / answered[1]
                    ticks[metric + canary.SECONDS] = Tick(1, parts[0], 1, parts[1])
        return ticks

    def _stalls(self, rollout: Rollout, reports: Sequence[ReplicaReport]) -> Tick | None:
        """Return a tick with the busy and the stalled replicas since the last reading.

        It is None if the canary or the baseline had no busy replica.
        """
        before, base = self.replicas, frozenset(target.deployment for target in rollout.base)
        ours, theirs = readings(reports, frozenset({rollout.deployment})), readings(reports, base)
        self.replicas = ours | theirs
        return tick_of(stalled(before, ours), stalled(before, theirs))

    def _note(
        self,
        rollout: Rollout,
        decision: CanaryDecision,
        canary_new: VariantCounts,
        base_new: VariantCounts,
        now: float,
    ) -> None:
        worst = max((each.e_worse for each in decision.state.evidence.values()), default=0.0)
        point = Point(
            now,
            canary.share(policy_of(rollout), self.state),
            sum(canary_new.times) + canary_new.failed,
            sum(base_new.times) + base_new.failed,
            canary_new.failed,
            base_new.failed,
            min(worst, 1e9),
        )
        last = self.points[-1] if self.points else None
        if last is not None and now - last.at < POINT_S and last.share == point.share:
            self.points[-1] = Point(
                last.at, point.share, last.canary + point.canary, last.base + point.base,
                last.canary_errors + point.canary_errors, last.base_errors + point.base_errors, point.e_worse,
            )  # fmt: skip
        else:
            self.points = [*self.points, point][-POINTS_KEPT:]

    def evidence(self, rollout: Rollout) -> dict[str, Any]:
        """Return the evidence for JSON, by metric: counts, rates, and e-values with their limits."""
        policy = policy_of(rollout)
        found = {}
        for metric, each in self.state.evidence.items():
            rates = each.rates
            limit = canary.roll_back_at(policy, self.state.evidence, metric)
            found[metric] = {
                "canary": each.canary, "canary_bad": each.canary_bad, "canary_rate": rates[0],
                "base": each.base, "base_bad": each.base_bad, "base_rate": rates[1],
                "e_worse": min(each.e_worse, 1e9), "roll_back_at": limit,
                "e_fine": min(each.e_fine, 1e9), "fine_at": 1 / policy.alpha,
                "decides_promotion": canary.decides_promotion(metric),
            }  # fmt: skip
            if metric == "quality":
                found[metric] |= {
                    "canary_mean": self.quality.canary.mean,
                    "base_mean": self.quality.base.mean,
                }
        return found

    def slow_ms(self) -> tuple[float, float] | None:
        """Return the latencies in ms above which answers are slow and very slow; None if not known yet."""
        if self.thresholds is None:
            return None
        return upper_s(self.thresholds.p90) * 1e3, upper_s(self.thresholds.p99) * 1e3

    def to_json(self) -> dict[str, Any]:
        """Return the evidence as a document."""
        document = asdict(self)
        del document["health"], document["samples"]
        document["replicas"] = {name: list(each) for name, each in self.replicas.items()}
        return document

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> RolloutWatch:
        """Read the result of :meth:`to_json`. Raise KeyError or TypeError if it is malformed."""
        state = document["state"]
        evidence = {metric: _restored(metric, each) for metric, each in state["evidence"].items()}
        thresholds = document["thresholds"]
        return cls(
            document["id"],
            CanaryState(**{**state, "evidence": evidence}),
            {key: VariantCounts(**each) for key, each in document["seen"].items()},
            document["base_times"],
            Thresholds(**thresholds) if thresholds else None,
            [Point(**each) for each in document["points"]],
            document["fresh"],
            _quality(document.get("quality")),
            {name: Reading(*each) for name, each in document.get("replicas", {}).items()},
        )


def _quality(document: dict[str, Any] | None) -> QualityWatch:
    """Return the outcomes from a document; no outcomes if it is None.

    ``document``: None if an earlier release, which stored no outcomes, wrote the evidence.
    """
    if document is None:
        return QualityWatch()
    limit = document["limit"]
    parts = {
        "limit": Limit(**limit) if limit else None,
        "canary": Outcomes(**document["canary"]),
        "base": Outcomes(**document["base"]),
        "waiting": tuple(document["waiting"]),
    }
    return QualityWatch(**{**document, **parts})


def _restored(metric: str, document: dict[str, Any]) -> Evidence:
    """Return the evidence from a document, with the margins and factors of this release.

    The document's own margins and factors are not used, because a factor can be infinite and JSON cannot
    store infinity.
    """
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in document.items()
    }
    for margin in ("margin", "harmful", "block_factor", "tick_factor"):
        values.pop(margin, None)
    return replace(canary.no_evidence(metric), **values)


def policy_of(rollout: Rollout) -> CanaryPolicy:
    """Return the policy from a rollout's options."""
    given = rollout.options
    return CanaryPolicy(
        tuple(given.steps), given.hold_s, given.min_samples, given.alpha, given.tolerance, given.patience_s
    )


def _phase(rollout: Rollout) -> canary.Phase:
    return "rolled_back" if rollout.phase == "aborted" else rollout.phase


def _nothing() -> VariantCounts:
    return VariantCounts(0, [0] * COUNT)


def _quantile(counts: list[int], part: float) -> int:
    """Return the number of the bucket that contains the quantile ``part`` (0 to 1)."""
    wanted, seen = part * sum(counts), 0
    for bucket, count in enumerate(counts):
        seen += count
        if seen >= wanted:
            return bucket
    return len(counts) - 1
