"""Report shadow traffic: copies, agreement by output, latencies, and a verdict in words. Pure."""

from __future__ import annotations

from dataclasses import asdict
from math import sqrt
from typing import Any, Literal, NamedTuple

from tidegate.kernel.protocol.latency_buckets import upper_s
from tidegate.kernel.protocol.shadow import OutputCounts, ShadowCounts

# A verdict needs this many compared answers.
ENOUGH = 100
# A shadow gets the verdict "fails" if more than this share of its copies failed (FAILING). It gets "differs"
# if more than this share of its answers differ from the primary's (DIFFERING). It gets "slower" if the 90th
# percentile of its call times is more than SLOWER times the primary's.
FAILING, DIFFERING, SLOWER = 0.01, 0.01, 1.25
_Z = 1.645  # quantile of the normal distribution for a one-sided 95 % interval
_QUANTILES = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))

Verdict = Literal["none", "too few", "fails", "differs", "slower", "agrees"]


class Judgement(NamedTuple):
    """A verdict and its reason."""

    verdict: Verdict
    why: str


def report(counts: ShadowCounts) -> dict[str, Any]:
    """Return the report for JSON. Times are in ms. Shares are from 0 to 1; None if nothing was compared."""
    failed = sum(counts.failed.values())
    judged = judge(counts)
    return {
        "offered": counts.offered,
        "copied": counts.copied,
        "answered": counts.answered,
        "failed": dict(sorted(counts.failed.items())),
        "in_flight": max(0, counts.copied - counts.answered - failed),
        "refused": dict(sorted(counts.refused.items())),
        "compared": counts.compared,
        "agreed": counts.agreed,
        "agreement": _share(counts.agreed, counts.compared),
        "agreement_at_least": _at_least(counts.agreed, counts.compared),
        "outputs": {name: _output(each) for name, each in sorted(counts.outputs.items())},
        "latency_ms": {
            "primary": _quantiles(counts.primary),
            "shadow": _quantiles(counts.shadow),
            "primary_call": _quantiles(counts.primary_call),
            "shadow_call": _quantiles(counts.shadow_call),
        },
        "last_failure": counts.last_failure,
        "differing": [asdict(each) for each in counts.differing],
        "verdict": judged.verdict,
        "why": judged.why,
    }


def judge(counts: ShadowCounts) -> Judgement:
    """Return the verdict. Failures are checked first, then differences, then latencies."""
    failed = sum(counts.failed.values())
    ended = counts.answered + failed
    if not counts.copied:
        return Judgement("none", _no_copies(counts))
    if failed and failed / ended > FAILING:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in _largest(counts.failed))
        return Judgement("fails", f"{failed} of {ended} copies failed ({reasons})")
    if counts.compared < ENOUGH:
        return Judgement("too few", f"{counts.compared} answers were compared; {ENOUGH} are needed")
    differing = counts.compared - counts.agreed
    if differing / counts.compared > DIFFERING:
        worst = min(counts.outputs.items(), key=lambda each: each[1].agreed / max(each[1].compared, 1))
        share = counts.agreed / counts.compared
        return Judgement(
            "differs",
            f"{share:.2%} of {counts.compared} answers agree; output {worst[0]!r} agrees in "
            f"{worst[1].agreed / max(worst[1].compared, 1):.2%}",
        )
    agrees = f"{counts.agreed} of {counts.compared} answers agree"
    ours, theirs = _quantile(counts.primary_call, 0.9), _quantile(counts.shadow_call, 0.9)
    if ours is not None and theirs is not None and theirs > SLOWER * ours:
        return Judgement(
            "slower",
            f"{agrees}, but 90% of the shadow's calls take up to {theirs:.3g} ms; 90% of the primary's calls "
            f"take up to {ours:.3g} ms",
        )
    return Judgement("agrees", agrees)


def _no_copies(counts: ShadowCounts) -> str:
    if not counts.offered:
        return "no request has been answered since the shadow started"
    reasons = ", ".join(f"{reason}: {count}" for reason, count in _largest(counts.refused))
    return f"no copy was sent ({reasons})" if reasons else "the first copies wait for an idle replica"


def _largest(reasons: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(reasons.items(), key=lambda each: -each[1])[:3]


def _output(counts: OutputCounts) -> dict[str, Any]:
    found: dict[str, Any] = {
        "compared": counts.compared,
        "agreed": counts.agreed,
        "agreement": _share(counts.agreed, counts.compared),
        "unlike": counts.unlike,
    }
    if counts.texts:
        found |= {
            "texts": counts.texts,
            "exact": _share(counts.exact, counts.texts),
            "edit_distance": counts.edits / counts.edited if counts.edited else None,
        }
    else:
        found |= {"max_abs": counts.max_abs, "max_rel": counts.max_rel}
    if counts.rows:
        found |= {"rows": counts.rows, "top1": _share(counts.top1, counts.rows)}
    return found


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _at_least(agreed: int, compared: int) -> float | None:
    """Return the lower limit of the share of agreeing answers, with 95 % confidence (Wilson, 1927)."""
    if not compared:
        return None
    share, z2 = agreed / compared, _Z * _Z
    spread = _Z * sqrt(share * (1 - share) / compared + z2 / (4 * compared**2))
    return (share + z2 / (2 * compared) - spread) / (1 + z2 / compared)


def _quantiles(times: list[int]) -> dict[str, float] | None:
    found = {name: _quantile(times, part) for name, part in _QUANTILES}
    return {name: value for name, value in found.items() if value is not None} or None


def _quantile(times: list[int], part: float) -> float | None:
    """Return the upper end, in ms, of the bucket that contains a quantile; None without times.

    ``part``: the quantile, from 0 to 1.
    """
    total = sum(times)
    if not total:
        return None
    seen = 0
    for bucket, count in enumerate(times):
        seen += count
        if seen >= part * total:
            return upper_s(bucket) * 1e3
    return upper_s(len(times) - 1) * 1e3
