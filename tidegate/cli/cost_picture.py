"""Draw a cost report as an SVG, with one bar for each item of the report.

An item is, for example, a Deployment or a key. The parts of its bar are the costs of its busy, idle and other
time.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from tidegate.cli.output import money_of

_WIDTH, _LEFT, _RIGHT, _TOP, _ROW, _BAR = 760, 170, 120, 70, 34, 20
_INK = "#222"
COLOURS = {
    "busy": "#30638e",
    "idle": "#c9ced6",
    "starting": "#edae49",
    "wasted": "#d1495b",
    "stopping": "#8d96a3",
    "unreported": "#7b2d26",
    "pending": "#e3e6ea",
}
MOST_ITEMS = 20


def svg(found: Mapping[str, Any]) -> str:
    """Return the picture of a cost report. Raise KeyError if the document is not a report."""
    by, currency, total = found["by"], found["currency"], found["total"]
    items = found["items"][:MOST_ITEMS]
    dearest = max((item["cost"] for item in items), default=0.0) or 1.0
    hours = found["replica_seconds"] / 3600
    parts = [
        _text(20, 24, f"{money_of(total['cost'])} {currency} for {hours:.2f} replica-hours", 15),
        *_legend(found),
    ]
    for place, item in enumerate(items):
        parts += _row(item[by], item, _TOP + place * _ROW, dearest)
    height = _TOP + max(1, len(items)) * _ROW + 30
    if (month := found["month"]) is not None:
        words = (
            f"this month: {money_of(month['spent'])} {currency} spent, {money_of(month['expected'])} expected"
        )
        parts.append(_text(20, height - 10, words, 11))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif">'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )


def _legend(found: Mapping[str, Any]) -> list[str]:
    """Return the legend: a coloured square, a name and a percentage for each use of the replicas' time."""
    parts, x = [], 20.0
    seconds, whole = found["total"]["seconds"], found["replica_seconds"] or 1.0
    for name, colour in COLOURS.items():
        if spent := seconds.get(name, 0.0):
            label = f"{name} {spent / whole:.1%}"
            parts.append(f'<rect x="{x:.0f}" y="38" width="10" height="10" fill="{colour}"/>')
            parts.append(_text(x + 14, 47, label, 11))
            x += 30 + 6.5 * len(label)
    return parts


def _row(name: str, item: Mapping[str, Any], y: float, dearest: float) -> list[str]:
    parts = [_text(20, y + 14, name[:22], 12)]
    x, whole = float(_LEFT), sum(item["seconds"].values()) or 1.0
    time_cost = item["direct"] + item["overhead"]
    scale = (_WIDTH - _LEFT - _RIGHT) / dearest
    for part, colour in COLOURS.items():
        if width := item["seconds"].get(part, 0.0) / whole * time_cost * scale:
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.0f}" width="{width:.1f}" height="{_BAR}" fill="{colour}"/>'
            )
            x += width
    each = item["per_1000_requests"]
    more = "" if each is None else f"  ({money_of(each)} / 1,000)"
    parts.append(_text(x + 6, y + 14, f"{money_of(item['cost'])}{more}", 11))
    return parts


def _text(x: float, y: float, text: str, size: int) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}" fill="{_INK}">{escape(text)}</text>'
