"""Draw a replay: arrivals, backlog, replicas and waits over time, with a line for each policy."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

OURS = ("#0a6cbd", "#2a9d5c", "#8a4fbf", "#c2407d", "#4c5f7a", "#b08900")
OTHERS = {"keda": "#e08b2c", "knative": "#9aa5b1"}

Timeline = Mapping[str, Sequence[float]]


def draw(title: str, timelines: Mapping[str, Timeline], target_wait_ms: float) -> bytes:
    """Return a PNG with the timeline of each policy.

    A timeline consists of the lists ``at`` (seconds), ``arrivals``, ``backlog``, ``ready``, ``target`` and
    ``wait_p95_ms``. They have the same length.
    """
    # matplotlib loads slowly, so it is imported only here. Its backend `agg` needs no window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(11, 9), layout="constrained")
    FigureCanvasAgg(figure)
    rows: Any = figure.subplots(4, 1, sharex=True)
    arrivals, backlog, replicas, waits = rows
    first = next(iter(timelines.values()))
    unit, name = _unit(first["at"][-1])
    times = [at / unit for at in first["at"]]
    arrivals.fill_between(times, first["arrivals"], step="post", color="#c9d3df", linewidth=0)
    colours = _colours(timelines)
    for label, timeline in timelines.items():
        look = {"color": colours[label], "linewidth": 1.3, "label": label}
        times = [at / unit for at in timeline["at"]]
        backlog.plot(times, timeline["backlog"], drawstyle="steps-post", **look)
        replicas.plot(times, timeline["ready"], drawstyle="steps-post", **look)
        waits.plot(
            times, [max(wait, 0.0) for wait in timeline["wait_p95_ms"]], drawstyle="steps-post", **look
        )
        if timeline["target"]:
            look |= {"linewidth": 0.8, "linestyle": (0, (3, 2)), "label": None}
            replicas.plot(times, timeline["target"], drawstyle="steps-post", **look)
    waits.axhline(target_wait_ms, color="#777777", linewidth=1, linestyle=(0, (6, 3)))
    waits.set_yscale("symlog", linthresh=max(1.0, target_wait_ms))
    labels = ("requests/s", "outstanding", "replicas ready", "wait p95, ms")
    for axis, label in zip(rows, labels, strict=True):
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(True, color="#e8e8e8", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    waits.set_xlabel(name)
    arrivals.set_title(title, loc="left", fontsize=12)
    replicas.legend(fontsize=9, frameon=False, ncols=len(timelines), loc="upper left")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120)
    return out.getvalue()


def _colours(timelines: Mapping[str, Timeline]) -> dict[str, str]:
    ours = [label for label in timelines if label not in OTHERS]
    return OTHERS | {label: OURS[place % len(OURS)] for place, label in enumerate(ours)}


def _unit(last_s: float) -> tuple[float, str]:
    if last_s > 2 * 86_400:
        return 86_400.0, "days"
    if last_s > 3 * 3600:
        return 3600.0, "hours"
    return (60.0, "minutes") if last_s > 300 else (1.0, "seconds")
