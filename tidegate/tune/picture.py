"""Draw throughput over p99 latency, with one line for each setting."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tidegate.kernel.errors import BadRequest
from tidegate.tune.curve import Point, front

FRONT, CHOSEN, LIMIT = "#1a1a1a", "#d62728", "#777777"
_MARKERS = "osD^vPX"
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))
_LABEL = {"textcoords": "offset points", "fontsize": 8}


def drawable() -> None:
    """Raise BadRequest if matplotlib is not installed. Only this picture needs it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise BadRequest(
            "`tidegate tune` draws with matplotlib, which is not installed: pip install matplotlib."
        )


def draw(path: Path, title: str, points: Sequence[Point], chosen: Point | None, latency_ms: float) -> None:
    """Write the picture. Raise BadRequest if the file cannot be written."""
    # This import is here, because matplotlib loads slowly. The Agg canvas needs no window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(10, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    measured = [point for point in points if point.p99_ms is not None]
    _axes(axis, title, measured, latency_ms)
    _settings(axis, measured)
    best = front(measured)
    axis.plot([p.p99_ms for p in best], [p.rps for p in best], color=FRONT, linewidth=3, alpha=0.35)
    figure.draw_without_rendering()  # compute the positions, which _labels needs to avoid overlaps
    _labels(axis, best, chosen)
    _chosen(axis, chosen)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise BadRequest(f"{path}: {error.strerror or error}.") from None


def _axes(axis: Any, title: str, points: Sequence[Point], latency_ms: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    plain = FuncFormatter(lambda value, _: f"{value:,.6g}")
    lowest = min([latency_ms or 1.0, *(p.p99_ms for p in points if p.p99_ms)])
    highest = max([latency_ms, lowest * 2, *(p.p99_ms for p in points if p.p99_ms)])
    span = highest / lowest
    axis.set_xscale("log")
    axis.set_xlim(lowest / span**0.28, highest * span**0.08)  # space for the labels on the left
    axis.set_ylim(0, 1.18 * max([1.0, *(p.rps for p in points)]))
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(plain)
    axis.yaxis.set_major_formatter(plain)
    axis.grid(True, color="#e8e8e8", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("p99 latency, ms")
    axis.set_ylabel("requests per second, one replica")
    loads = ", ".join(str(count) for count in sorted({p.connections for p in points}))
    axis.set_title(f"{title}: throughput and latency of batching", loc="left", fontsize=12, pad=22)
    axis.text(0, 1.02, f"each line: one setting at {loads} connections", transform=axis.transAxes, fontsize=9)
    axis.axvline(latency_ms, color=LIMIT, linewidth=1, linestyle=(0, (6, 3)))
    where = {"xycoords": ("data", "axes fraction"), "xytext": (-4, -4), "ha": "right", "va": "top"}
    axis.annotate(f"limit {latency_ms:g} ms", (latency_ms, 1), color=LIMIT, **where, **_LABEL)


def _settings(axis: Any, points: Sequence[Point]) -> None:
    """Draw one line for each setting.

    The batch size decides the line's colour. The window decides the line's marker and dashes.
    """
    import matplotlib as mpl
    from matplotlib.lines import Line2D

    batches = sorted({point.setting.max_batch for point in points})
    windows = sorted({point.setting.window_ms for point in points})
    places = [index / max(1, len(batches) - 1) for index in range(len(batches))]
    colours = dict(zip(batches, mpl.colormaps["viridis"]([0.92 * (1 - p) for p in places]), strict=True))
    looks = {
        window: {"marker": _MARKERS[i % len(_MARKERS)], "linestyle": _DASHES[i % len(_DASHES)]}
        for i, window in enumerate(windows)
    }
    shape: dict[str, Any] = {"markersize": 5, "linewidth": 1.2}
    for setting in sorted({point.setting for point in points}):
        mine = sorted((p for p in points if p.setting == setting), key=lambda p: p.connections)
        look = looks[setting.window_ms] | shape | {"color": colours[setting.max_batch], "alpha": 0.85}
        axis.plot([p.p99_ms for p in mine], [p.rps for p in mine], **look)
    handles = [Line2D([], [], color=colour, linewidth=4, label=f"batch {b}") for b, colour in colours.items()]
    handles += [
        Line2D([], [], color=FRONT, label=f"window {window:g} ms" if window else "no window", **look, **shape)
        for window, look in looks.items()
    ]
    handles.append(Line2D([], [], color=FRONT, linewidth=3, alpha=0.35, label="best for its p99"))
    axis.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9, frameon=False)


def _labels(axis: Any, best: Sequence[Point], chosen: Point | None) -> None:
    """Label the points of the Pareto front. Put each label above the previous one.

    So no two labels overlap. The chosen point gets its label elsewhere.
    """
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=3, foreground="white")]
    points_per_pixel = 72 / axis.figure.dpi
    free = 0.0
    for point in best:
        if point == chosen:
            continue
        _, y = axis.transData.transform((point.p99_ms, point.rps)) * points_per_pixel
        at = max(y + 5, free)
        free = at + 11
        text = f"{point.setting}, {point.connections} conn."
        place = {"xytext": (-7, at - y), "ha": "right"}
        axis.annotate(text, (point.p99_ms, point.rps), color=FRONT, path_effects=halo, **place, **_LABEL)


def _chosen(axis: Any, chosen: Point | None) -> None:
    if chosen is None:
        return
    where = (chosen.p99_ms, chosen.rps)
    ring = {"marker": "o", "markersize": 15, "markerfacecolor": "none", "markeredgewidth": 2}
    axis.plot(*[[value] for value in where], color=CHOSEN, linestyle="none", **ring)
    axis.annotate(
        f"chosen: {chosen.setting}, {chosen.connections} conn.\n"
        f"{chosen.rps:,.0f} requests/s, p99 {chosen.p99_ms:.3g} ms",
        where,
        textcoords="offset points",
        xytext=(-11, 7),
        ha="right",
        fontsize=9,
        fontweight="bold",
        color=CHOSEN,
    )
