"""The tables and the bars of ``benchmarks.llm``."""

from __future__ import annotations

from typing import Any

from benchmarks import report
from benchmarks.bars import Bar

SIDES = ("direct", "tidegate")
TIMES = ("first_p50_ms", "first_p99_ms", "between_p50_ms", "between_p99_ms")


def tables(name: str, found: dict[str, Any]) -> list[str]:
    """Return the tables of one engine."""
    rows = found["callers"]
    heads = ["callers", "answered", "Tidegate", "tokens/s direct", "Tidegate", "ratio"]
    for title in ("first token p50 ms", "p99", "between tokens p50 ms", "p99"):
        heads += [title, "Tidegate"]
    body = [
        [
            callers,
            *(f"{row[side]['answered']}/{row[side]['requests']}" for side in SIDES),
            *(f"{row[side]['tokens_per_s']:.1f}" for side in SIDES),
            f"{row['ratio']:.2f}x",
            *(f"{row[side][key]:.1f}" for key in TIMES for side in SIDES),
        ]
        for callers, row in rows.items()
    ]
    kinds = sorted({kind for row in rows.values() for kind in row["tidegate"]["cpu_us"]})
    per_token = [
        [
            callers,
            f"{sum(row['direct']['cpu_us'].values()):,.0f}",
            *(f"{row['tidegate']['cpu_us'].get(kind, 0.0):,.0f}" for kind in kinds),
        ]
        for callers, row in rows.items()
    ]
    return [
        f"{name}, {found['slots']} slots: medians\n\n{report.table(heads, body)}",
        f"CPU microseconds per token\n\n{report.table(['callers', 'engine direct', *kinds], per_token)}",
    ]


def judge(name: str, found: dict[str, Any]) -> list[Bar]:
    """Return the bars of one engine. Comparisons are medians over rounds, each of two runs in turn."""
    slots, bars = found["slots"], []
    rows = {int(callers): row for callers, row in found["callers"].items()}
    for callers, row in rows.items():
        who = f"{name}, {callers} caller{'s' * (callers > 1)}"
        ratio, gaps = row["ratio"], row["between_p99_ratio"]
        answered, wanted = row["tidegate"]["answered"], row["tidegate"]["requests"]
        bars.append(_bar(f"{who}: tokens/s at least 0.95x direct", ratio >= 0.95, f"{ratio:.2f}x"))
        told = f"{answered} of {wanted}"
        bars.append(_bar(f"{who}: every request is answered", answered == wanted, told))
        if callers <= slots:
            met = gaps <= 1.1
            bars.append(_bar(f"{who}: p99 between tokens at most 1.1x direct", met, f"{gaps:.2f}x"))
    if 1 in rows:
        more = rows[1]["first_more_ms"]
        text = f"{name}, 1 caller: first token at most 10 ms after the direct one"
        bars.append(_bar(text, more <= 10, f"{more:+.1f} ms"))
    most = max(rows)
    if most > slots:
        best = max(row["tidegate"]["tokens_per_s"] for row in rows.values())
        share = rows[most]["tidegate"]["tokens_per_s"] / best
        text = f"{name}, {most} callers: at least 0.95x the best tokens/s"
        bars.append(_bar(text, share >= 0.95, f"{share:.2f}x of {best:.1f}"))
    return bars


def _bar(text: str, met: bool, detail: str) -> Bar:
    return Bar(text, "PASS" if met else "MISS", detail)
