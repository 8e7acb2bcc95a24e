"""The bars (required results), checked against the results of one run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.peer import Peer, Role
from benchmarks.report import Results
from benchmarks.workloads import Name

OPEN, KEYED = "tidegate", "tidegate@key"


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: met, missed, or unknown because a figure is missing."""

    text: str
    verdict: Literal["PASS", "MISS", "SKIP"]
    detail: str

    def line(self) -> str:
        """Return the bar as a line of text."""
        return f"{self.verdict}  {self.text}: {self.detail}"


def judge(results: Results, peers: Sequence[Peer]) -> list[Bar]:
    """Return every bar. The bar against Triton uses the better of its variants."""
    names = _names(peers)
    return [
        _faster(results, "digits", 64, names["reference"], 0.5, "Triton asked directly"),
        _faster(results, "digits", 64, ["fastapi"], 1.0, "FastAPI + onnxruntime in process"),
        _faster(results, "digits", 64, names["server"], 3.0, "the best of the model servers"),
        _faster(results, "digits", 64, names["queue"], 12.0, "FastAPI + Celery"),
        _quicker_plus(results, "digits", names["reference"], 1.0, "Triton asked directly"),
        _quicker_times(results, "digits", names["queue"], 0.6, "FastAPI + Celery"),
        _faster(results, "image", 16, names["queue"], 2.0, "FastAPI + Celery"),
        _faster(results, "image", 16, names["reference"], 0.25, "Triton asked directly"),
        _keeps(results, "digits", 64, 0.9),
        _quicker_plus(results, "digits", names["reference"], 1.1, "Triton asked directly", ours=KEYED),
    ]


def _names(peers: Sequence[Peer]) -> dict[Role, list[str]]:
    roles: tuple[Role, ...] = ("reference", "tidegate", "server", "queue", "limit")
    return {role: [peer.name for peer in peers if peer.role == role] for role in roles}


def _keeps(results: Results, workload: Name, connections: int, factor: float) -> Bar:
    """Return the bar for requests with a key: the median ratio to those without."""
    text = f"{workload}, {connections} connections{_how(KEYED)}: at least {factor:g}x itself without"
    ratio = results.ratio(KEYED, OPEN, workload, connections)
    if ratio is None:
        return _skipped(text, results.rate(KEYED, workload, connections))
    return Bar(text, "PASS" if ratio >= factor else "MISS", f"{ratio:.2f}x, median of the rounds")


def _faster(
    results: Results, workload: Name, connections: int, others: Iterable[str], factor: float, who: str
) -> Bar:
    text = f"{workload}, {connections} connections: at least {factor:g}x {who}"
    rate = results.rate(OPEN, workload, connections)
    rates = {n: r for n in others if (r := results.rate(n, workload, connections)) is not None}
    if rate is None or not rates:
        return _skipped(text, rate)
    best = max(rates, key=lambda name: rates[name])
    told = f"{rate / rates[best]:.2f}x ({rate:,.0f} against {rates[best]:,.0f} req/s of {best})"
    return Bar(text, "PASS" if rate >= factor * rates[best] else "MISS", told)


def _quicker_plus(
    results: Results, workload: Name, others: Iterable[str], extra_ms: float, who: str, ours: str = OPEN
) -> Bar:
    text = f"{workload}, 1 connection{_how(ours)}: p50 at most {who} + {extra_ms:g} ms"
    p50, best = results.p50_ms(ours, workload, 1), _best_p50(results, workload, others)
    if p50 is None or best is None:
        return _skipped(text, p50)
    told = f"{p50:.2f} ms against {best:.2f} ms, +{p50 - best:.2f} ms"
    return Bar(text, "PASS" if p50 <= best + extra_ms else "MISS", told)


def _quicker_times(results: Results, workload: Name, others: Iterable[str], factor: float, who: str) -> Bar:
    text = f"{workload}, 1 connection: p50 at most {factor:g}x {who}"
    p50, best = results.p50_ms(OPEN, workload, 1), _best_p50(results, workload, others)
    if p50 is None or best is None:
        return _skipped(text, p50)
    told = f"{p50 / best:.2f}x ({p50:.2f} ms against {best:.2f} ms)"
    return Bar(text, "PASS" if p50 <= factor * best else "MISS", told)


def _best_p50(results: Results, workload: Name, others: Iterable[str]) -> float | None:
    return min(
        (p50 for name in others if (p50 := results.p50_ms(name, workload, 1)) is not None), default=None
    )


def _how(ours: str) -> str:
    return ", with an API key" if ours == KEYED else ""


def _skipped(text: str, ours: float | None) -> Bar:
    return Bar(
        text, "SKIP", "the other side was not measured" if ours is not None else "Tidegate was not measured"
    )
