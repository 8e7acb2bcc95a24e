"""The five symptoms: each is named with its remedy, and a clean history of any kind has none of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from services.router.domain.diagnosis.case import Case, Day, DeploymentFacts, Spans, case_of
from services.router.domain.diagnosis.diagnose import diagnose, report
from services.router.domain.diagnosis.finding import Symptom
from services.router.domain.watch.history import History
from services.router.domain.watch.window import ReplicaWork, Window
from tidegate.kernel.protocol.traffic_histograms import histograms_of

pytestmark = pytest.mark.unit

T0 = 1_700_000_000.0
SPAN = 900.0
MAIN = DeploymentFacts("m-v1", "m", 1, low=1, high=2, ready=2, desired=2)


class World:
    """A noisy endpoint, from a seed. Each window has a level of its own, as on a busy machine."""

    def __init__(self, seed: int, **usual: Any) -> None:
        self.random = np.random.default_rng(seed)
        self.usual: dict[str, Any] = {
            "rate": 3.0, "model_ms": 10.0, "queue_ms": 2.0, "batch_ms": 1.0, "body_ms": 0.3, "replicas": 2.0,
            "used": 0.5, "failed": 0.001, "deployment": "m-v1", "slow_replica": 1.0, "rejected": 0.0,
            "callers": 40, "cold_s": 0.0,
        } | usual  # fmt: skip

    def window(self, start: float, seconds: float = SPAN, **changes: Any) -> Window:
        now = self.usual | changes
        level = self.random.lognormal(0, 0.1)
        count = max(1, int(self.random.poisson(now["rate"] * seconds)))
        part = {
            name: now[f"{name}_ms"] / 1e3 * level * self.random.lognormal(0, 0.4, count)
            for name in ("body", "queue", "batch", "model")
        }
        replicas = {}
        for number in range(round(now["replicas"])):
            factor = now["slow_replica"] if number == 0 else 1.0
            mine = max(1, int(count / now["replicas"] / (factor if factor > 1 else 1)))
            part["model"][:mine] *= factor if number == 0 else 1.0
            call = now["model_ms"] * factor * level * self.random.lognormal(0, 0.05)
            replicas[f"r{number}"] = ReplicaWork(mine, mine * call / 1e3, mine * call, mine * 2.0, 0.0)
        columns = [part["body"], part["queue"], part["batch"], part["model"], part["body"]]
        rows = np.column_stack([sum(columns), *columns])
        failed = int(self.random.binomial(count, min(1, now["failed"])))
        rejected = int(self.random.binomial(count, min(1, now["rejected"])))
        outcomes = {"ok": count, "model_failed": failed, "overloaded": rejected}
        used = min(1.0, now["used"] * level)
        running = now["replicas"] * seconds
        return Window(
            start, start + seconds, histograms_of(rows), outcomes, failed + rejected, 0,
            {now["deployment"]: count}, now["callers"], running, running * used, now["cold_s"],
            replicas=replicas,
        )  # fmt: skip

    def case(
        self, blocks: int = 24, days: list[Day] | None = None, main: DeploymentFacts = MAIN, **changes: Any
    ) -> Case:
        past = [self.window(T0 - (blocks - at) * SPAN) for at in range(blocks)]
        return Case("m", self.window(T0, **changes), past, days or [], [main], Spans(SPAN))

    def days(self, number: int, mean: float = 40.0, failed: float = 0.001) -> list[Day]:
        found = []
        for day in range(number):
            weekend = 0.4 if day % 7 >= 5 else 1.0
            callers = int(self.random.poisson(mean * weekend))
            found.append(Day(T0 + day * 86_400, callers, callers * 100, int(callers * 100 * failed)))
        return found


def only(case: Case) -> Symptom:
    (found,) = diagnose(case)
    return found


@pytest.mark.parametrize("seed", range(5))
def test_a_slow_model(seed):
    found = only(World(seed).case(model_ms=30.0))
    assert (found.symptom, found.cause) == ("feels_slow", "model")
    assert found.remedy.command == "tidegate logs m --since 15m"
    assert "p95 by part: model +" in found.evidence[1]
    new = DeploymentFacts("m-v2", "m", 2)
    assert (
        only(World(seed).case(model_ms=30.0, deployment="m-v2", main=new)).remedy.command
        == "tidegate rollback m"
    )


@pytest.mark.parametrize(
    ("changes", "cause", "command"),
    [
        ({"queue_ms": 40.0, "used": 0.9}, "queue", "tidegate policy m-v1 --set max_replicas=3"),
        ({"queue_ms": 40.0, "used": 0.2}, "network", "tidegate status"),
        ({"queue_ms": 400.0, "cold_s": 60.0}, "cold start", "tidegate policy m-v1 --set min_replicas=1"),
        ({"body_ms": 15.0}, "client", "tidegate usage --by principal --endpoint m"),
        ({"batch_ms": 40.0, "used": 0.2}, "batching", "tidegate deploy m --version 1 --batch-window-ms 0"),
    ],
)
def test_the_part_of_the_time_that_grew_is_the_cause(changes, cause, command):
    found = only(World(1).case(**changes))
    assert (found.symptom, found.cause, found.remedy.command) == ("feels_slow", cause, command)


@pytest.mark.parametrize("seed", range(5))
def test_one_slow_replica(seed):
    found = only(World(seed).case(slow_replica=12.0))
    assert (found.symptom, found.cause) == ("inconsistent_times", "replica r0")
    assert found.remedy.command == "tidegate drain r0"
    assert "a call of r0 takes" in found.evidence[1]


@pytest.mark.parametrize("seed", range(5))
def test_oversized_replicas(seed):
    found = only(World(seed).case(replicas=6.0, used=0.15))
    assert (found.symptom, found.cause) == ("cost_grows", "too many replicas")
    assert found.remedy.command == "tidegate policy m-v1 --set scaling.aggressiveness=economy"
    held = DeploymentFacts("m-v1", "m", 1, 1, 9, 6, 6, override=6)
    assert (
        only(World(seed).case(replicas=6.0, used=0.15, main=held)).remedy.command
        == "tidegate scale m-v1 --auto"
    )
    low = DeploymentFacts("m-v1", "m", 1, 6, 9, 6, 6)
    command = only(World(seed).case(replicas=6.0, used=0.15, main=low)).remedy.command
    assert command == "tidegate policy m-v1 --set min_replicas=2"


def test_more_replicas_for_more_requests_are_no_waste():
    assert diagnose(World(1).case(replicas=6.0, rate=9.0, used=0.5)) == []
    assert diagnose(World(1).case(rate=0.3, used=0.05)) == []  # a quiet night


@pytest.mark.parametrize("seed", range(5))
def test_overload(seed):
    found = only(World(seed).case(rate=9.0, rejected=0.2, used=0.97, queue_ms=900.0))
    assert (found.symptom, found.cause) == ("errors_under_load", "too few replicas")
    assert found.remedy.command == "tidegate policy m-v1 --set max_replicas=3"
    full = DeploymentFacts("m-v1", "m", 1, 1, 2, 2, 2, host_full=True)
    command = only(World(seed).case(rate=9.0, rejected=0.2, used=0.97, main=full)).remedy.command
    assert command == "tidegate why m-v1"


def test_a_broken_model_is_no_overload():
    assert diagnose(World(1).case(failed=0.3)) == []


@pytest.mark.parametrize("seed", range(5))
def test_callers_leave(seed):
    world = World(seed)
    found = only(world.case(days=[*world.days(28), *world.days(7, mean=14)]))
    assert (found.symptom, found.cause) == ("adoption_falls", "fewer callers")
    assert found.remedy.command.startswith("tidegate usage --by day,principal --endpoint m")
    broken = [*world.days(28), *world.days(7, mean=14, failed=0.5)]
    assert diagnose(world.case(days=broken)) == []


def test_without_keys_requests_are_counted():
    world = World(1)
    days = [day._replace(callers=1) for day in [*world.days(28), *world.days(7, mean=14)]]
    assert only(world.case(days=days)).cause == "fewer requests"


def clean() -> Iterator[list[Symptom]]:
    """Diagnose 1,000 windows of clean histories: other levels, daily waves, quiet nights, few requests."""
    for seed in range(50):
        rate = (0.1, 0.5, 1.0, 3.0)[seed % 4]
        wave = (0.0, 0.6)[seed % 2]
        world = World(
            seed, rate=rate, replicas=(1.0, 2.0, 3.0)[seed % 3], model_ms=(1.0, 10.0, 200.0)[seed % 3]
        )
        windows = []
        for at in range(60):
            load = 1 + wave * np.sin(at / 48 * 2 * np.pi)
            windows.append(
                world.window(
                    T0 + at * SPAN,
                    rate=rate * load,
                    used=min(0.95, 0.4 * load),
                    queue_ms=2.0 * max(1.0, load),
                )
            )
        days = world.days(35)
        for at in range(40, 60):
            yield diagnose(Case("m", windows[at], windows[:at], days[: at - 20], [MAIN], Spans(SPAN)))


def test_no_diagnosis_in_1000_clean_windows():
    found = list(clean())
    assert len(found) == 1000
    assert [each for each in found if each] == []


def test_without_a_past_there_is_no_verdict():
    assert report(World(1).case(blocks=2), [])["state"] == "learning"
    assert report(World(1).case(rate=0.001), [])["state"] == "idle"
    assert report(World(1).case(), [])["state"] == "healthy"
    assert diagnose(World(1).case(blocks=2, model_ms=100.0)) == []


def test_a_case_comes_from_the_history():
    history, world, spans = History(), World(1, rate=10.0), Spans(60.0, 600.0, 30.0, 2)
    start = T0 // 60 * 60
    for tick in range(180):
        at = start + tick * 5
        history.add({"m": world.window(at, 5.0, callers=9 if tick < 160 else 3)})
    case = case_of("m", history.of("m"), [MAIN], spans, start + 900)
    assert len(case.blocks) == 10
    assert all(550 < block.requests < 650 for block in case.blocks)
    assert [day.callers for day in case.days[-4:]] == [9, 3, 3, 3]
    assert len(case.days) == 29  # the first day is not full, and today is missing
    assert not case.learning


def test_a_short_burst_is_no_symptom():
    world, spans = World(1, rate=10.0), Spans(60.0, 600.0)
    for bursts, expected in ((range(8, 10), []), (range(12), ["feels_slow"])):
        history, start = History(), T0 // 60 * 60
        for tick in range(132):
            slow = {"model_ms": 80.0} if tick - 120 in bursts else {}
            history.add({"m": world.window(start + tick * 5, 5.0, **slow)})
        case = case_of("m", history.of("m"), [MAIN], spans, start + 660)
        assert [each.symptom for each in diagnose(case)] == expected


def test_days_before_the_first_request_do_not_count():
    history, world, spans = History(), World(1), Spans(60.0, 600.0, 30.0, 2)
    start = T0 // 60 * 60
    for tick in range(60):
        at = start + tick * 5
        history.add({"m": world.window(at, 5.0) if tick >= 20 else Window(at, at + 5)})
    assert len(case_of("m", history.of("m"), [MAIN], spans, start + 300).days) == 6


@pytest.mark.parametrize("slow_ticks", [3, 5, 6, 8, 12])
def test_a_model_that_just_became_slow_is_never_named_inconsistent(slow_ticks):
    world, spans = World(1, rate=20.0), Spans(60.0, 600.0)
    history, start = History(), T0 // 60 * 60
    for tick in range(132):
        slow = {"model_ms": 80.0} if tick >= 132 - slow_ticks else {}
        history.add({"m": world.window(start + tick * 5, 5.0, **slow)})
    case = case_of("m", history.of("m"), [MAIN], spans, start + 660)
    assert "inconsistent_times" not in [each.symptom for each in diagnose(case)]


@pytest.mark.parametrize(("slow_ticks", "expected"), [(8, []), (12, ["inconsistent_times"])])
def test_a_tail_without_a_known_cause_must_last_for_the_whole_window(slow_ticks, expected):
    world, spans = World(1, rate=40.0, replicas=1.0), Spans(60.0, 600.0)
    history, start = History(), T0 // 60 * 60
    for tick in range(132):
        tail = {"slow_replica": 20.0} if tick >= 132 - slow_ticks else {}
        history.add({"m": world.window(start + tick * 5, 5.0, **tail)})
    case = case_of("m", history.of("m"), [MAIN], spans, start + 660)
    assert [each.symptom for each in diagnose(case)] == expected
