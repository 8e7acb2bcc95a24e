"""``python -m benchmarks.llm``: measure a language model's engine called directly and through Tidegate.

Both run with the same arguments and get load alternately; the other one is idle meanwhile. The results
are tokens per second, the time to the first token and between tokens, and the CPU time per token of each
process of Tidegate. The numbers of callers are 1, the engine's slots, and four times as many. Each run
sends a fixed number of requests: none may be refused or lost, whatever the number of waiting requests.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import cpu, llm_engines, llm_report, options, report, session, stack
from benchmarks.bars import Bar
from benchmarks.llm_engines import Engine
from tidegate.stack import processes
from tidegate.stack.processes import Process
from tidegate.tune.http_call import Target
from tidegate.tune.llm_figures import LlmFigures
from tidegate.tune.llm_load import LlmLoad, LlmLoadPlan
from tidegate.tune.prompts import ChatBodies, Prompts

PROMPT_WORDS, ANSWER_TOKENS = 8, 24
OPTIONS = {"max_tokens": ANSWER_TOKENS, "ignore_eos": True, "temperature": 0}
FEWEST = 2  # requests of a run; more if there are more callers


@dataclass(frozen=True, slots=True)
class Run:
    """One run: its figures, and the CPU microseconds per token by kind of process."""

    figures: LlmFigures
    cpu_us: dict[str, float]


@dataclass(slots=True)
class Side:
    """The engine called directly, or Tidegate: its address, its processes, and its runs by callers."""

    title: str
    target: Target
    model: str
    members: Callable[[], Iterable[Process]]
    runs: dict[int, list[Run]] = field(default_factory=dict)
    begun: int = 0

    def run(self, callers: int) -> None:
        """Measure one closed loop, in which each caller sends at least one request."""
        load = self._load(callers)
        before = cpu.usage(self.members())
        asyncio.run(load.run())
        used = cpu.usage(self.members()).since(before)
        figures = load.figures()
        per_token = {kind: us / max(1, figures.tokens) for kind, us in used.items()}
        self.runs.setdefault(callers, []).append(Run(figures, per_token))

    def _load(self, callers: int) -> LlmLoad:
        # No two requests of the benchmark have the same prompt, so no answer comes from a cache.
        self.begun += 1
        bodies = ChatBodies(self.model, Prompts(PROMPT_WORDS, seed=self.begun), OPTIONS)
        requests = max(FEWEST, callers)
        return LlmLoad(LlmLoadPlan(self.target, bodies.body, callers=callers, requests=requests))

    def median_of(self, callers: int, pick: Callable[[LlmFigures], float | None]) -> float:
        """Return the median of a figure over the rounds."""
        values = [value for run in self.runs[callers] if (value := pick(run.figures)) is not None]
        return median(values) if values else float("nan")

    def median_cpu(self, callers: int) -> dict[str, float]:
        """Return CPU microseconds per token by kind of process."""
        runs = self.runs[callers]
        kinds = sorted({kind for run in runs for kind in run.cpu_us})
        return {kind: median(run.cpu_us.get(kind, 0.0) for run in runs) for kind in kinds}


FIGURES: dict[str, Callable[[LlmFigures], float | None]] = {
    "tokens_per_s": lambda f: f.tokens_per_s,
    "first_p50_ms": lambda f: f.first_token.percentiles[50],
    "first_p99_ms": lambda f: f.first_token.percentiles[99],
    "between_p50_ms": lambda f: f.between_tokens.percentiles[50],
    "between_p99_ms": lambda f: f.between_tokens.percentiles[99],
}


def main() -> int:
    """Measure, print, write llm.json and llm.png. Return 1 if a bar is missed."""
    chosen = _arguments()
    machine = report.machine()
    results: dict[str, Any] = {}
    with session.session():
        for engine in llm_engines.available(chosen.engines):
            print(f"\n{engine.title}: starting it directly and through Tidegate", flush=True)
            results[engine.name] = measure(engine, chosen)
    print(f"\n{report.machine_line(machine)}; {chosen.repeats} rounds\n")
    bars: list[Bar] = []
    for name, found in results.items():
        print("\n\n".join(llm_report.tables(name, found)), end="\n\n")
        bars += llm_report.judge(name, found)
    for bar in bars:
        print(bar.line())
    out: Path = chosen.out / "llm.json"
    report.write_json(out, {"machine": machine, "engines": results})
    print(f"\nResults: {out}\n{report.draw('llm', out, '.svg')}")
    return 1 if any(bar.verdict == "MISS" for bar in bars) else 0


def measure(engine: Engine, chosen: argparse.Namespace) -> dict[str, Any]:
    """Measure both sides alternately."""
    with ExitStack() as held:
        direct_url, direct_process = held.enter_context(engine.direct(chosen.slots))
        running = held.enter_context(stack.tidegate("llm"))
        engine.deploy(running, chosen.slots)
        direct = Side(
            f"{engine.title} direct",
            llm_engines.target(direct_url),
            engine.model,
            lambda: cpu.family(direct_process),
        )
        ours = Side(
            "Tidegate",
            llm_engines.target(running.url),
            llm_engines.NAME,
            lambda: processes.marked(running.state),
        )
        for side in (direct, ours):  # the first requests load the weights into the page cache
            side.run(1)
            side.runs.clear()
        for number in range(chosen.repeats):
            for callers in levels(chosen):
                # Each side is first in half of the rounds.
                for side in (direct, ours) if number % 2 == 0 else (ours, direct):
                    side.run(callers)
                print(f"round {number + 1}, {callers} callers: {_line(direct, ours, callers)}", flush=True)
    return document(direct, ours, chosen)


def levels(chosen: argparse.Namespace) -> list[int]:
    """Return the numbers of callers."""
    return chosen.callers or sorted({1, chosen.slots, 4 * chosen.slots})


def _line(direct: Side, ours: Side, callers: int) -> str:
    a, b = (side.runs[callers][-1].figures for side in (direct, ours))
    problems = {**a.problems, **b.problems} or ""
    return f"{a.tokens_per_s:.1f} tokens/s direct, {b.tokens_per_s:.1f} through Tidegate {problems}".rstrip()


def document(direct: Side, ours: Side, chosen: argparse.Namespace) -> dict[str, Any]:
    """Return the medians of all runs."""
    sides = {"direct": direct, "tidegate": ours}

    def paired(callers: int, figure: str, compare: Callable[[float, float], float]) -> float:
        """Return the median over the rounds. Each round compares two runs of the same minute."""
        pick = FIGURES[figure]
        runs = zip(ours.runs[callers], direct.runs[callers], strict=True)
        values = ((pick(a.figures), pick(b.figures)) for a, b in runs)
        return median([compare(a, b) for a, b in values if a is not None and b] or [float("nan")])

    return {
        "slots": chosen.slots,
        "callers": {
            str(callers): {
                name: {key: side.median_of(callers, pick) for key, pick in FIGURES.items()}
                | {
                    "requests": max(FEWEST, callers) * chosen.repeats,
                    "answered": sum(run.figures.answered for run in side.runs[callers]),
                    "failed": sum(run.figures.failed for run in side.runs[callers]),
                    "cpu_us": side.median_cpu(callers),
                }
                for name, side in sides.items()
            }
            | {
                "ratio": paired(callers, "tokens_per_s", lambda ours, direct: ours / direct),
                "first_more_ms": paired(callers, "first_p50_ms", lambda ours, direct: ours - direct),
                "between_p99_ratio": paired(callers, "between_p99_ms", lambda ours, direct: ours / direct),
            }
            for callers in levels(chosen)
        },
    }


def _arguments() -> argparse.Namespace:
    parser = options.parser(__doc__, repeats=8)
    parser.add_argument("--callers", type=options.numbers, help="default: 1, slots, 4 x slots")
    parser.add_argument(
        "--slots", type=int, default=8, help="requests that the engine runs at the same time (default: 8)"
    )
    parser.add_argument(
        "--engines",
        type=options.names(llm_engines.NAMES),
        default=list(llm_engines.NAMES),
        help="llamacpp or vllm; default: the installed ones",
    )
    return parser.parse_args()


if __name__ == "__main__":
    session.run(main)
