"""``plot.py KIND RESULTS.json PICTURE.png``: draw the chart of a result file, in a separate environment."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

OURS, OTHERS, DIRECT = "#0a6cbd", "#9aa5b1", "#e08b2c"


def peers(found: dict[str, Any]) -> Any:
    """Draw requests per second of every peer: a row per workload, a column per number of connections."""
    connections = sorted({cell["connections"] for cell in found["medians"]})
    names = list(found["workloads"])
    figure, axes = plt.subplots(
        len(names), len(connections), figsize=(5 * len(connections), 3.4 * len(names)), squeeze=False
    )
    for row, workload in enumerate(names):
        for column, count in enumerate(connections):
            cells = [c for c in found["medians"] if (c["workload"], c["connections"]) == (workload, count)]
            _bars(axes[row][column], sorted(cells, key=lambda c: c["rate"]), found["titles"])
            plural = "connection" if count == 1 else "connections"
            axes[row][column].set_title(f"{found['workloads'][workload]}, {count} {plural}", fontsize=9)
    return figure


def _bars(axis: Any, cells: list[dict[str, Any]], titles: dict[str, str]) -> None:
    colours = [
        OURS if c["peer"] == "tidegate" else DIRECT if c["peer"].startswith("triton") else OTHERS
        for c in cells
    ]
    drawn = axis.barh([titles[c["peer"]] for c in cells], [c["rate"] for c in cells], color=colours)
    axis.bar_label(drawn, [f"{c['rate']:,.0f}" for c in cells], fontsize=7, padding=2)
    axis.tick_params(labelsize=7)
    axis.margins(x=0.15)
    axis.set_xlabel("requests per second", fontsize=7)


def overload(found: dict[str, Any]) -> Any:
    """Draw goodput and rejects over the offered load, and the p99 of accepted requests."""
    steps = found["steps"]
    offered = [step["offered_x"] for step in steps]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 7), sharex=True)
    top.plot(offered, [step["goodput"] for step in steps], "o-", color=OURS, label="answered in time")
    top.plot(offered, [step["offered"] for step in steps], ":", color=OTHERS, label="offered")
    for reason in sorted({reason for step in steps for reason in step["refused"]}):
        rates = [step["refused"].get(reason, 0) / step["seconds"] for step in steps]
        top.plot(offered, rates, ".--", label=reason)
    top.axhline(found["capacity"], color=DIRECT, linewidth=1, label="capacity, closed loop")
    top.set_ylabel("requests per second")
    top.legend(fontsize=8)
    bottom.plot(
        offered, [step["p99_ms"] for step in steps], "o-", color=OURS, label="p99 of accepted requests"
    )
    bottom.plot(offered, [step["p50_ms"] for step in steps], "o--", color=OTHERS, label="p50")
    bottom.axhline(found["deadline_ms"], color=DIRECT, linewidth=1, label="deadline")
    bottom.set_ylabel("milliseconds")
    bottom.set_ylim(bottom=0)
    bottom.set_xlabel("offered load, as a multiple of the capacity")
    bottom.legend(fontsize=8)
    return figure


def soak(found: dict[str, Any]) -> Any:
    """Draw the memory of every kind of process over time."""
    figure, axis = plt.subplots(figsize=(9, 5))
    minutes = [look["at"] / 60 for look in found["looks"]]
    kinds = sorted({kind for look in found["looks"] for kind in look["mb"]})
    colours = plt.get_cmap("tab20")
    for number, kind in enumerate(kinds):
        values = [look["mb"].get(kind, 0.0) for look in found["looks"]]
        axis.plot(minutes, values, color=colours(number % 20), linewidth=1.2, label=kind)
    rates = ", ".join(f"{each['rate']:,.0f} {name}/s" for name, each in found["figures"].items())
    axis.set_title(f"{found['share']:.0%} of the capacity: {rates}", fontsize=9)
    axis.set_ylabel("megabytes (proportional set size)")
    axis.set_xlabel("minutes")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=7, ncols=2)
    return figure


def llm(found: dict[str, Any]) -> Any:
    """Draw tokens per second and the time to the first token over callers, direct and through Tidegate."""
    engines = found["engines"]
    figure, axes = plt.subplots(2, len(engines), figsize=(6 * len(engines), 6.5), squeeze=False, sharex="col")
    for column, (name, measured) in enumerate(engines.items()):
        callers = sorted(measured["callers"], key=int)
        top, bottom = axes[0][column], axes[1][column]
        for side, label, colour in (("direct", f"{name} direct", DIRECT), ("tidegate", "Tidegate", OURS)):
            rows = [measured["callers"][each][side] for each in callers]
            counts = [int(each) for each in callers]
            top.plot(counts, [row["tokens_per_s"] for row in rows], "o-", color=colour, label=label)
            bottom.plot(
                counts, [row["first_p50_ms"] for row in rows], "o-", color=colour, label=f"{label}, p50"
            )
            bottom.plot(
                counts, [row["first_p99_ms"] for row in rows], ".--", color=colour, label=f"{label}, p99"
            )
        top.axvline(measured["slots"], color=OTHERS, linewidth=1, linestyle=":")
        top.set_ylabel("tokens per second")
        top.set_ylim(bottom=0)
        top.set_title(f"SmolLM2-135M, {name}, {measured['slots']} slots (dotted line)", fontsize=9)
        top.legend(fontsize=8)
        bottom.set_ylabel("milliseconds to the first token")
        bottom.set_yscale("log")
        bottom.set_xscale("log", base=2)
        bottom.set_xticks([int(each) for each in callers], callers)
        bottom.set_xlabel("callers, each with one request at a time")
        bottom.legend(fontsize=8)
    return figure


def main() -> None:
    """Draw the chart of the given kind."""
    kind, results, picture = sys.argv[1:]
    draw = {"peers": peers, "overload": overload, "soak": soak, "llm": llm}[kind]
    figure = draw(json.loads(Path(results).read_text()))
    figure.tight_layout()
    figure.savefig(picture, dpi=130)


if __name__ == "__main__":
    main()
