"""Jobs while every part is killed with SIGKILL: none is lost, none is doubled, all results are right.

The same course as ``python -m benchmarks.chaos``, with fewer jobs.
"""

from __future__ import annotations

import asyncio

import pytest

from benchmarks import places, stack
from benchmarks.chaos import course, kills, verdict
from tests.conftest import Figure
from tidegate.kernel.settings.base import Settings

pytestmark = pytest.mark.e2e

JOBS, RATE = 500, 25.0


def test_every_part_is_killed_once(tmp_path, monkeypatch, figure: Figure):
    monkeypatch.setenv("TIDEGATE_RUNTIME_DIR", str(Settings().runtime_path))
    monkeypatch.setenv("TIDEGATE_BENCH_DIR", str(tmp_path))
    with stack.tidegate("chaos", course.SETTINGS) as running:
        running.deploy(stack.MODELS / "echo" / "model.py", course.MODEL)
        outcome = asyncio.run(course.run(running, JOBS, RATE, kills.PARTS))
    bars = verdict.judge(outcome.evidence)
    away = ", ".join(f"{kill.part} {kill.away_s:.1f} s" for kill in outcome.kills)
    figure(f"{JOBS} jobs in {outcome.seconds:.0f} s, killed meanwhile and away: {away}")
    print(outcome.trouble, dict(outcome.evidence.gauge))
    assert [kill.part for kill in outcome.kills] == list(kills.PARTS)
    assert all(bar.met for bar in bars), verdict.lines(bars)
    assert places.bench_dir() == tmp_path
