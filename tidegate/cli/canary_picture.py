"""Draw a rollout as an SVG: the canary's share, the error rates, and the evidence of harm over time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from math import log10
from typing import Any

WIDTH, PANEL, LEFT, TOP, GAP = 760, 110, 70, 40, 34
CANARY, BASE, INK, FAINT = "#d1495b", "#30638e", "#222", "#ccc"


def svg(found: Mapping[str, Any]) -> str:
    """Return a rollout's measurements over time as an SVG. Raise KeyError if the document is no rollout."""
    points: Sequence[Mapping[str, Any]] = found["points"]
    rollout = found["rollout"]
    limit = max((each["roll_back_at"] for each in found["evidence"].values()), default=20.0)
    begin, end = points[0]["at"], max(points[-1]["at"], points[0]["at"] + 1)

    def x(at: float) -> float:
        return float(LEFT + (WIDTH - LEFT - 20) * (at - begin) / (end - begin))

    top_rate = max([0.01, *(_rate(p, "canary") for p in points), *(_rate(p, "base") for p in points)])
    top_log = max(2.0, log10(limit) * 1.3)
    panels = [
        ("share of the canary, %", 100.0, [(lambda p: float(p["share"]), CANARY)], None),
        (
            "errors, %",
            100 * top_rate,
            [(lambda p: 100 * _rate(p, "canary"), CANARY), (lambda p: 100 * _rate(p, "base"), BASE)],
            None,
        ),
        (
            "evidence of harm, log10",
            top_log,
            [(lambda p: max(0.0, min(log10(max(p["e_worse"], 1.0)), top_log)), CANARY)],
            log10(limit),
        ),
    ]
    parts: list[str] = []
    for index, (title, top, lines, limit_at) in enumerate(panels):
        parts += _panel(index, title, top, lines, limit_at, points, x)
    foot = f"{end - begin:.0f} s; red: canary, blue: baseline, dashed: limit of a rollback"
    title = f"{found['endpoint']}: {rollout['deployment']} {rollout['phase'].replace('_', ' ')}"
    return page(title, foot, parts, len(panels))


def page(title: str, foot: str, parts: Sequence[str], panels: int) -> str:
    """Return an SVG with a title, ``panels`` panels, and a line below the panels.

    ``parts``: the SVG elements of the panels. ``foot``: the line, as escaped text or as SVG elements.
    """
    height = TOP + panels * (PANEL + GAP) + 20
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">'
        f'<rect width="100%" height="100%" fill="white"/>'
        f'<text x="{LEFT}" y="20" font-size="14" fill="{INK}">{escape(title)}</text>{"".join(parts)}'
        f'<text x="{LEFT}" y="{height - 8}" font-size="11" fill="{INK}">{foot}</text></svg>\n'
    )


def _panel(
    index: int,
    title: str,
    top: float,
    lines: Sequence[tuple[Callable[[Mapping[str, Any]], float], str]],
    limit_at: float | None,
    points: Sequence[Mapping[str, Any]],
    x: Callable[[float], float],
) -> list[str]:
    floor = TOP + index * (PANEL + GAP) + PANEL

    def y(value: float) -> float:
        return floor - PANEL * min(value, top) / top

    right = WIDTH - 20
    parts = [
        f'<text x="{LEFT}" y="{floor - PANEL - 6}" font-size="12" fill="{INK}">{escape(title)}</text>',
        f'<path d="M{LEFT} {floor}H{right}M{LEFT} {floor - PANEL}H{right}" stroke="{FAINT}"/>',
        f'<text x="{LEFT - 8}" y="{floor}" font-size="11" text-anchor="end" fill="{INK}">0</text>',
        f'<text x="{LEFT - 8}" y="{floor - PANEL + 8}" font-size="11" text-anchor="end" fill="{INK}">'
        f"{top:.3g}</text>",
    ]
    if limit_at is not None:
        at = y(limit_at)
        parts.append(
            f'<path d="M{LEFT} {at:.1f}H{right}" stroke="{INK}" stroke-dasharray="4 3" fill="none"/>'
        )
    for value, colour in lines:
        path = "L".join(f"{x(point['at']):.1f} {y(value(point)):.1f}" for point in points)
        parts.append(f'<path d="M{path}" stroke="{colour}" stroke-width="1.6" fill="none"/>')
    return parts


def _rate(point: Mapping[str, Any], side: str) -> float:
    return float(point[f"{side}_errors"] / max(point[side], 1))
