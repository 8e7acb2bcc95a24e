"""Describe drift for JSON: a summary of each version, and the details of one version. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from services.router.domain.drift import Comparison
from services.router.domain.drift_history import LEARN_ROWS, DriftHistory, WindowLimits, worst
from tidegate.kernel.protocol.models import DesiredState, Endpoint

WORST = 5


def versions_of(desired: DesiredState, name: str) -> list[tuple[str, int]]:
    """Return the versions (model, number) behind a name; empty if the name is unknown.

    The name is that of an endpoint, a Deployment or a model. An endpoint's versions are ordered by weight,
    with the canary last. A model's versions are ordered by number, the newest first.
    """
    by_name = {each.name: (each.model, each.version) for each in desired.deployments}
    endpoint = next((each for each in desired.endpoints if each.name == name), None)
    if endpoint is not None:
        found = [by_name[each] for each in deployments_of(endpoint) if each in by_name]
        return list(dict.fromkeys(found))
    if name in by_name:
        return [by_name[name]]
    served = [each for each in by_name.values() if each[0] == name]
    return sorted(set(served), reverse=True)


def deployments_of(endpoint: Endpoint) -> list[str]:
    """Return the Deployments of an endpoint: its targets by weight, then its canary."""
    targets = sorted(endpoint.targets, key=lambda each: -each.weight)
    names = [each.deployment for each in targets]
    if endpoint.rollout is not None and endpoint.rollout.active:
        names.append(endpoint.rollout.deployment)
    return list(dict.fromkeys(names))


def places(desired: DesiredState, key: tuple[str, int]) -> dict[str, list[str]]:
    """Return the Deployments of a version, and the endpoints that send traffic to them."""
    deployments = [each.name for each in desired.deployments if (each.model, each.version) == key]
    endpoints = [each.name for each in desired.endpoints if set(deployments_of(each)) & set(deployments)]
    return {"deployments": deployments, "endpoints": endpoints}


def state_of(history: DriftHistory) -> tuple[str, str]:
    """Return the state of a version's drift, and the reason if there is no verdict.

    ``learning``: no baseline yet. ``unknown``: no window is closed yet, or the last one has too few rows.
    Otherwise, the state is that of the worst column.
    """
    if history.bins is None:
        return "learning", f"{history.learned_rows} of {LEARN_ROWS} rows to learn the bins from"
    if history.baseline is None:
        rows = history.open.profile.rows if history.open else 0
        return "learning", f"{rows} rows for the baseline so far"
    if history.comparison is None:
        return "unknown", "no window has been closed yet"
    return history.comparison.state, history.comparison.reason


def summary(
    model: str, version: int, history: DriftHistory, limits: WindowLimits, against: Comparison | None
) -> dict[str, Any]:
    """Return the summary of a version's drift, with its worst columns.

    ``against``: the comparison with the predecessor; None if there is no such comparison.
    """
    state, reason = state_of(history)
    found = history.comparison
    return {
        "model": model,
        "version": version,
        "state": state,
        "reason": reason,
        "score": round(found.columns[found.ranked[0]].score, 4) if found and found.columns else None,
        "drifted": found.drifted if found else [],
        "worst": [{"column": name, **each.to_json()} for name, each in worst(found, WORST)],
        "baseline": _baseline(history),
        "window": _window(history),
        "open_rows": history.open.profile.rows if history.open else 0,
        "window_rows": limits.rows,
        "sampled_rows": history.rows,
        "dropped_rows": history.dropped,
        "predecessor": None if against is None else against.state,
    }


def detail(
    model: str,
    version: int,
    history: DriftHistory,
    limits: WindowLimits,
    against: tuple[int, Comparison] | None,
) -> dict[str, Any]:
    """Return a version's drift: all columns, the worst columns' histograms, and the history of windows."""
    found = summary(model, version, history, limits, against[1] if against else None)
    comparison = history.comparison
    found["columns"] = (
        [{"column": name, **comparison.columns[name].to_json()} for name in comparison.ranked]
        if comparison
        else []
    )
    found["histograms"] = _histograms(history, comparison.ranked[:WORST] if comparison else [])
    found["points"] = [
        {
            "begin": each.begin,
            "end": each.end,
            "rows": each.rows,
            "state": each.state,
            "scores": each.scores,
            "drifted": each.drifted,
        }
        for each in history.points
    ]
    if against is not None:
        number, other = against
        found["predecessor"] = {
            "version": number,
            "state": other.state,
            "reason": other.reason,
            "worst": [{"column": name, **each.to_json()} for name, each in worst(other, WORST)],
        }
    return found


def _baseline(history: DriftHistory) -> dict[str, Any] | None:
    if history.baseline is None:
        return None
    return {"source": history.baseline.source, "rows": history.baseline.profile.rows}


def _window(history: DriftHistory) -> dict[str, Any] | None:
    if history.last is None:
        return None
    return {"begin": history.last.begin, "end": history.last.end, "rows": history.last.profile.rows}


def _histograms(history: DriftHistory, names: Iterable[str]) -> dict[str, Any]:
    """Return the histograms of the numeric columns ``names``: in the baseline and in the last window."""
    found: dict[str, Any] = {}
    if history.baseline is None or history.last is None or history.bins is None:
        return found
    for name in names:
        before, after = history.baseline.profile.numbers.get(name), history.last.profile.numbers.get(name)
        if before is not None and after is not None and after.n and name in history.bins:
            bins = history.bins[name]
            found[name] = {
                "cuts": list(bins.cuts),
                "low": min(bins.low, after.least),
                "high": max(bins.high, after.most),
                "baseline": _shares(before.counts.tolist()),
                "window": _shares(after.counts.tolist()),
            }
    return found


def _shares(counts: Sequence[int]) -> list[float]:
    total = max(1, sum(counts))
    return [round(each / total, 5) for each in counts]
