"""Draw an experiment as an SVG: for each metric, the difference to the control and its interval over time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from tidegate.cli.canary_picture import BASE, CANARY, FAINT, GAP, INK, LEFT, PANEL, TOP, WIDTH, page

_COLOURS = (CANARY, BASE, "#edae49", "#66a182", "#8d6a9f")
# The largest value on the vertical axis is at most ``_ZOOM`` times the largest bound of the treatments' last
# intervals. Earlier intervals can be wider. The picture cuts off what lies outside of the axis.
_ZOOM = 3.0


def svg(found: Mapping[str, Any]) -> str:
    """Return an experiment's measurements over time as an SVG.

    Raise KeyError if the document is not an experiment.
    """
    points: Sequence[Mapping[str, Any]] = found["points"]
    stated = found["experiment"]
    begin, end = points[0]["at"], max(points[-1]["at"], points[0]["at"] + 1)

    def x(at: float) -> float:
        return float(LEFT + (WIDTH - LEFT - 20) * (at - begin) / (end - begin))

    parts = []
    for index, metric in enumerate(found["metrics"]):
        series = {name: _series(points, metric["name"], name) for name in stated["treatments"]}
        title = f"{metric['name']}: difference to {stated['control']} ({_state(metric)})"
        parts += _panel(index, title, series, x)
    title = f"{found['endpoint']}: {', '.join(stated['treatments'])} against {stated['control']}"
    colours = "; ".join(
        f'<tspan fill="{_COLOURS[at % len(_COLOURS)]}">{escape(name)}</tspan>'
        for at, name in enumerate(stated["treatments"])
    )
    foot = f"{end - begin:.0f} s; {colours}; bands: confidence intervals, valid at all times; dashed: 0"
    return page(f"{title}, {stated['phase']}", foot, parts, len(found["metrics"]))


def _series(
    points: Sequence[Mapping[str, Any]], metric: str, treatment: str
) -> list[tuple[float, float, float, float]]:
    """Return (time, difference, lower bound, upper bound) for each measurement that has an interval."""
    found = []
    for point in points:
        values = point["differences"].get(metric, {}).get(treatment)
        if values and None not in values:
            found.append((point["at"], *values))
    return found


def _state(metric: Mapping[str, Any]) -> str:
    verdicts = [each["comparison"]["verdict"] for each in metric["variants"] if each["comparison"]]
    return ", ".join(dict.fromkeys(verdicts))


def _panel(
    index: int,
    title: str,
    series: Mapping[str, Sequence[tuple[float, float, float, float]]],
    x: Callable[[float], float],
) -> list[str]:
    floor = TOP + index * (PANEL + GAP) + PANEL
    ends = [each[-1] for each in series.values() if each]
    widest = max((abs(bound) for _, _, low, high in ends for bound in (low, high)), default=1.0)
    every = [each for points in series.values() for each in points]
    most = max((abs(bound) for _, _, low, high in every for bound in (low, high)), default=1.0)
    top = min(most, _ZOOM * widest) or 1.0

    def y(value: float) -> float:
        return floor - PANEL / 2 - PANEL / 2 * max(-top, min(value, top)) / top

    right = WIDTH - 20
    parts = [
        f'<text x="{LEFT}" y="{floor - PANEL - 6}" font-size="12" fill="{INK}">{escape(title)}</text>',
        f'<path d="M{LEFT} {floor}H{right}M{LEFT} {floor - PANEL}H{right}" stroke="{FAINT}"/>',
        f'<path d="M{LEFT} {y(0):.1f}H{right}" stroke="{INK}" stroke-dasharray="4 3" fill="none"/>',
        *(
            f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" font-size="11" text-anchor="end" fill="{INK}">'
            f"{value:.3g}</text>"
            for value in (top, 0.0, -top)
        ),
    ]
    for at, each in enumerate(series.values()):
        colour = _COLOURS[at % len(_COLOURS)]
        if each:
            upper = [f"{x(when):.1f} {y(high):.1f}" for when, _, _, high in each]
            lower = [f"{x(when):.1f} {y(low):.1f}" for when, _, low, _ in reversed(each)]
            middle = "L".join(f"{x(when):.1f} {y(value):.1f}" for when, value, _, _ in each)
            parts.append(f'<path d="M{"L".join(upper + lower)}Z" fill="{colour}" fill-opacity="0.18"/>')
            parts.append(f'<path d="M{middle}" stroke="{colour}" stroke-width="1.6" fill="none"/>')
    return parts
