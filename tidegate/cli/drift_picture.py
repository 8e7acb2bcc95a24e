"""Draw a drift report as an SVG: scores over time, and histograms of the columns that drifted most."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_WIDTH, _LEFT, _RIGHT, _PANEL, _TOP = 860, 70, 20, 150, 48
_CELL, _GAP = 130, 44
_NOW, _BASE, _INK, _FAINT, _LIMIT = "#d1495b", "#30638e", "#222", "#ccc", "#888"
_COLOURS = ("#d1495b", "#30638e", "#edae49", "#66a182", "#8d6a9f")
_COLUMNS = 3


def svg(version: Mapping[str, Any]) -> str:
    """Return a version's drift as an SVG: a panel of scores, and histograms of the worst columns."""
    points: Sequence[Mapping[str, Any]] = version["points"]
    names = [each["column"] for each in version["worst"]]
    parts = [
        f'<text x="{_LEFT}" y="22" font-size="15" fill="{_INK}">{escape(version["model"])} version '
        f"{version['version']}: {escape(version['state'])}</text>"
    ]
    parts += _scores(points, names)
    top = _TOP + _PANEL + 56
    shown = [(name, version["histograms"][name]) for name in names if name in version["histograms"]]
    for at, (name, histogram) in enumerate(shown[:_COLUMNS]):
        parts += _histogram(name, histogram, _score_of(version, name), at, top)
    height = top + _CELL + 44
    parts.append(
        f'<text x="{_LEFT}" y="{height - 8}" font-size="11" fill="{_INK}">score: distance divided by its '
        f"limit, so 1 is the limit. Blue: baseline, red: last window. Bars: share of the rows per width."
        f"</text>"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif">'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )


def _score_of(version: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(each for each in version["worst"] if each["column"] == name)
    return found


def _scores(points: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    floor, right = _TOP + _PANEL, _WIDTH - _RIGHT
    begin, end = points[0]["end"], max(points[-1]["end"], points[0]["end"] + 1)
    most = max([1.5, *(score for point in points for score in point["scores"].values())])

    def x(at: float) -> float:
        return float(_LEFT + (right - _LEFT) * (at - begin) / (end - begin))

    def y(score: float) -> float:
        return float(floor - _PANEL * score / most)

    parts = [
        f'<path d="M{_LEFT} {floor}H{right}" stroke="{_FAINT}"/>',
        f'<path d="M{_LEFT} {y(1):.1f}H{right}" stroke="{_LIMIT}" stroke-dasharray="4 3"/>',
        f'<text x="{_LEFT - 8}" y="{y(1) + 4:.1f}" font-size="11" text-anchor="end" fill="{_INK}">1</text>',
        f'<text x="{_LEFT - 8}" y="{floor}" font-size="11" text-anchor="end" fill="{_INK}">0</text>',
        f'<text x="{_LEFT}" y="{floor + 16}" font-size="11" fill="{_INK}">{len(points)} windows, '
        f"{end - begin:,.0f} s</text>",
    ]
    for at, name in enumerate(names):
        those = [(point["end"], point["scores"][name]) for point in points if name in point["scores"]]
        colour = _COLOURS[at % len(_COLOURS)]
        parts += [
            f'<circle cx="{x(when):.1f}" cy="{y(score):.1f}" r="2.4" fill="{colour}"/>'
            for when, score in those
        ]
        if len(those) > 1:
            path = "L".join(f"{x(when):.1f} {y(score):.1f}" for when, score in those)
            parts.append(f'<path d="M{path}" stroke="{colour}" fill="none" stroke-width="1.4"/>')
        parts.append(
            f'<text x="{_LEFT + at * 155}" y="{_TOP - 8}" font-size="11" fill="{colour}">'
            f"{escape(name[:22])}</text>"
        )
    return parts


def _histogram(
    name: str, found: Mapping[str, Any], verdict: Mapping[str, Any], at: int, top: float
) -> list[str]:
    width = (_WIDTH - _LEFT - _RIGHT - _GAP * (_COLUMNS - 1)) / _COLUMNS
    left, floor = _LEFT + at * (width + _GAP), top + _CELL
    edges = [found["low"], *found["cuts"], found["high"]]
    pairs = list(itertools.pairwise(edges))
    heights = [
        [share / max(b - a, 1e-12) for (a, b), share in zip(pairs, found[side], strict=True)]
        for side in ("baseline", "window")
    ]
    # The first and last bins can be very narrow. Then their bars are very high. These bars do not set the
    # vertical scale, so that the other bars stay visible.
    most = max([max(each[1:-1] or each) for each in heights]) * 1.15 or 1.0
    # Outliers would make the inner bins too narrow to see. So the horizontal axis ends a little outside the
    # inner bins.
    spread = (edges[-2] - edges[1]) or 1.0
    low, high = max(edges[0], edges[1] - 0.4 * spread), min(edges[-1], edges[-2] + 0.4 * spread)
    span = (high - low) or 1.0

    def x(value: float) -> float:
        return float(left + width * (min(max(value, low), high) - low) / span)

    parts = [
        f'<text x="{left:.1f}" y="{top - 6}" font-size="12" fill="{_INK}">{escape(name[:24])}: '
        f"{escape(verdict['state'])}, score {verdict['score']:.2f}</text>",
        f'<path d="M{left:.1f} {floor}h{width:.1f}" stroke="{_FAINT}"/>',
        f'<text x="{left:.1f}" y="{floor + 14}" font-size="10" fill="{_INK}">{low:.3g}</text>',
        f'<text x="{left + width:.1f}" y="{floor + 14}" font-size="10" text-anchor="end" '
        f'fill="{_INK}">{high:.3g}</text>',
    ]
    for each, colour in zip(heights, (_BASE, _NOW), strict=True):
        steps = [f"M{x(low):.1f} {floor}"]
        for (a, b), value in zip(pairs, each, strict=True):
            y = floor - _CELL * min(value / most, 1.0)
            steps.append(f"L{x(a):.1f} {y:.1f}L{x(b):.1f} {y:.1f}")
        steps.append(f"L{x(high):.1f} {floor}")
        parts.append(f'<path d="{"".join(steps)}" stroke="{colour}" fill="{colour}" fill-opacity="0.15"/>')
    return parts
