"""Test the simulated queue against theory, all kinds of arrivals, and the comparison of policies."""

from __future__ import annotations

import math
from collections import Counter
from datetime import UTC, datetime
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.autoscaler.domain.replay import arrivals
from services.autoscaler.domain.replay.comparison import LIVE, Comparison, PolicyVariant, changed, compare
from services.autoscaler.domain.replay.controllers import DecideController
from services.autoscaler.domain.replay.fleet import ReplicaTiming, SimulatedFleet
from services.autoscaler.domain.replay.formulas import FleetView, Keda, Knative
from services.autoscaler.domain.replay.run import percentile, replay, summary, timeline
from services.autoscaler.domain.snapshot import Policy
from tests.unit.autoscaler.conftest import START, a_deployment, a_version
from tidegate.kernel.errors import BadRequest


def ours(**given) -> DecideController:
    return DecideController(LIVE, a_deployment(**given), a_version(), Policy())


def waits_of(count: int, rps: float, call_ms: float, batch: int = 1, seconds: float = 2000.0) -> list[float]:
    came = arrivals.synthetic("constant", rps=rps, factor=1.0, seconds=seconds, seed=3)
    fixed = ours(min_replicas=count, max_replicas=count, target_wait_ms=1e6)
    service = ReplicaTiming(call_ms=call_ms, batch=batch)
    found = replay(came, fixed, service, seconds=seconds, start_at=START, period_s=10.0)
    assert len(found.waits) + found.left + len(found.expired) == len(came)
    return list(found.waits)


@pytest.mark.parametrize("busy", [0.3, 0.6, 0.8])
def test_one_server_waits_as_the_theory_of_queues_says(busy):
    """With Poisson arrivals and constant service (M/D/1), the mean wait is busy / (2 (1 - busy)) services."""
    waits = waits_of(1, rps=busy * 10, call_ms=100.0, seconds=8000.0)
    expected = 100.0 * busy / (2 * (1 - busy))
    assert sum(waits) / len(waits) == pytest.approx(expected, rel=0.1)


def test_more_servers_and_larger_batches_shorten_the_queue():
    one, two, batched = (
        percentile(sorted(waits_of(*args)), 95)
        for args in ((1, 9.0, 100.0), (2, 9.0, 100.0), (1, 9.0, 100.0, 8))
    )
    assert two < one / 3
    assert batched < one / 2


def test_nobody_waits_beyond_the_deadline():
    came = [float(n) / 100 for n in range(1000)]
    fixed = ours(min_replicas=1, max_replicas=1)
    service = ReplicaTiming(call_ms=1000.0, deadline_s=5.0)
    found = replay(came, fixed, service, seconds=60.0, start_at=START)
    assert max(found.waits) <= 5000.0
    assert len(found.expired) > 900
    assert len(found.waits) + len(found.expired) == 1000


def test_what_is_drained_finishes_its_call_and_is_paid_until_then():
    fleet = SimulatedFleet(ReplicaTiming(call_ms=2000.0, start_s=1.0))
    controller = ours()
    controller.begin(fleet, START)
    fleet.advance([START], START, START + 1)
    (server,) = fleet.servers.values()
    fleet.drain(server.running.replica, START + 1)
    fleet.advance([START + 1], START + 1, START + 10)
    assert server.completed == 1
    assert len(fleet.queue) == 1
    assert fleet.replica_s == pytest.approx(2.0)


@settings(max_examples=15, deadline=None)
@given(
    shape=st.sampled_from(["constant", "step", "ramp", "spike", "bursty"]),
    rps=st.floats(0.5, 20),
    factor=st.floats(0.5, 8),
    low=st.integers(0, 2),
    more=st.integers(1, 6),
    call_ms=st.floats(5, 400),
    start_s=st.floats(0.5, 20),
    temper=st.sampled_from(["economy", "balanced", "latency"]),
)
def test_no_request_is_lost_and_the_bounds_hold(shape, rps, factor, low, more, call_ms, start_s, temper):
    came = arrivals.synthetic(shape, rps=rps, factor=factor, seconds=120.0, seed=1)
    controller = ours(min_replicas=low, max_replicas=low + more, scaling={"aggressiveness": temper})
    found = replay(
        came, controller, ReplicaTiming(call_ms=call_ms, start_s=start_s), seconds=150.0, start_at=START
    )
    assert len(found.waits) + len(found.expired) + found.left == len(came)
    assert all(low <= look.target <= low + more for look in found.samples)
    assert min(found.waits, default=0.0) >= 0.0


@pytest.mark.parametrize("rps", [1.0, 3.0, 12.0])
@pytest.mark.parametrize("temper", ["economy", "balanced"])
def test_chance_in_a_steady_load_does_not_make_it_flap(rps, temper):
    """Ten minutes of Poisson arrivals at 100 ms each, without the first two minutes."""
    came = arrivals.synthetic("constant", rps=rps, factor=1.0, seconds=720.0, seed=5)
    controller = ours(max_replicas=8, scaling={"aggressiveness": temper})
    found = replay(came, controller, ReplicaTiming(call_ms=100.0, start_s=4.0), seconds=720.0, start_at=START)
    targets = [look.target for look in found.samples if look.at > 120]
    assert sum(b > a for a, b in pairwise(targets)) <= 1, "a random burst may happen"


def a_comparison(**given) -> Comparison:
    came = arrivals.synthetic("spike", rps=3.0, factor=10.0, seconds=600.0, seed=1)
    plain = {
        "deployment": a_deployment(max_replicas=4, scaling={"price_per_hour": 2.0}),
        "version": a_version(),
        "policy": Policy(),
        "service": ReplicaTiming(call_ms=100.0, start_s=3.0),
        "arrivals": came,
        "seconds": 600.0,
        "start_at": START,
    }
    return Comparison(**{**plain, **given})


def test_a_spike_beside_the_others_formulas():
    found = compare(
        a_comparison(others=["keda", "knative"], variants=[PolicyVariant("cheap", {"max_replicas": 1})])
    )
    by_name = {result["name"]: result for result in found["results"]}
    assert list(by_name) == ["live", "cheap", "keda", "knative"]
    live, cheap = by_name["live"], by_name["cheap"]
    assert live["served"] == live["requests"] == found["requests"]
    assert live["late_share"] < by_name["knative"]["late_share"] < by_name["keda"]["late_share"]
    assert live["reversals"] == 1, "up once, down once"
    assert live["cost"] == pytest.approx(2.0 * live["replica_hours"])
    assert cheap["most_replicas"] == 1
    assert cheap["late_share"] > 0.2
    assert found["decisions"]["live"][0]["rule"]
    course = found["timelines"]["live"]
    assert len({len(values) for values in course.values()}) == 1
    assert max(course["ready"]) == 4.0
    assert sum(course["arrivals"]) * 600.0 / len(course["at"]) == pytest.approx(found["requests"])


def test_a_replay_is_the_same_each_time():
    assert compare(a_comparison()) == compare(a_comparison())


def test_what_no_policy_can_be():
    plain = a_deployment(max_replicas=4, scaling={"max_up_per_minute": 3})
    assert (
        changed(plain, PolicyVariant("a", {"scaling": {"max_up_per_minute": None}})).scaling.max_up_per_minute
        is None
    )
    with pytest.raises(BadRequest, match=r"'a': scaling\.aggressiveness"):
        changed(plain, PolicyVariant("a", {"scaling": {"aggressiveness": "brave"}}))
    with pytest.raises(BadRequest, match="above max"):
        changed(plain, PolicyVariant("a", {"min_replicas": 5}))
    with pytest.raises(BadRequest, match="a different name"):
        compare(a_comparison(variants=[PolicyVariant("live", {})]))


def test_the_forecast_has_replicas_there_when_the_office_opens():
    """Starts take five minutes, on the third day of the same curve, from half past eight."""
    day, opening = 86_400.0, 9 * 3600.0
    came = arrivals.synthetic("workday", rps=0.2, factor=30.0, seconds=2 * day + 10 * 3600.0, seed=2)
    begin = 2 * day + opening - 1800.0
    study = a_comparison(
        deployment=a_deployment(max_replicas=12, target_wait_ms=1000.0, start_timeout_s=600.0),
        service=ReplicaTiming(call_ms=500.0, start_s=300.0, deadline_s=600.0),
        arrivals=[at - begin for at in came if at >= begin],
        seconds=5400.0,
        start_at=begin,
        period_s=5.0,
        variants=[PolicyVariant("foreseeing", {"scaling": {"forecast": "daily"}})],
        history=Counter(int(at // 60) for at in came if at < begin),
    )
    live, foreseeing = compare(study)["results"]
    assert live["late"] > 1000
    assert foreseeing["late"] < 0.05 * live["late"]
    assert foreseeing["replica_hours"] < 1.6 * live["replica_hours"]


@pytest.mark.parametrize("shape", ["constant", "step", "ramp", "spike"])
def test_shapes(shape):
    came = arrivals.synthetic(shape, rps=20.0, factor=4.0, seconds=900.0, seed=1)
    assert came == sorted(came)
    assert 0 <= came[0] < came[-1] < 900
    per_minute = Counter(int(at // 60) for at in came)
    rates = [per_minute[m] / 60 for m in range(15)]
    assert rates[0] == pytest.approx(20, rel=0.3)
    if shape == "step":
        assert rates[4] == pytest.approx(20, rel=0.2)
        assert rates[5] == pytest.approx(80, rel=0.2)
    if shape == "ramp":
        assert rates[4] == pytest.approx(20 + 60 * 270 / 600, rel=0.2)
        assert rates[14] == pytest.approx(80, rel=0.2)
    if shape == "spike":
        assert [rate > 50 for rate in rates] == [360 <= m * 60 < 540 for m in range(15)]
    assert came == arrivals.synthetic(shape, rps=20.0, factor=4.0, seconds=900.0, seed=1)


def test_bursts_come_and_go():
    came = arrivals.synthetic("bursty", rps=2.0, factor=20.0, seconds=3600.0, seed=1)
    per_ten = Counter(int(at // 10) for at in came)
    assert 15 < sum(per_ten[n] > 150 for n in range(360)) < 150


def test_files():
    assert arrivals.from_csv("time\n5\n5.5\n7\n") == [0.0, 0.5, 2.0]
    assert arrivals.from_csv("at,count\n10,2\n20,4\n") == [0.0, 5.0, 10.0, 12.5, 15.0, 17.5]
    dated = arrivals.from_csv("2026-01-01T00:00:00Z,1\n2026-01-01T00:01:00Z,1\n")
    assert dated == [0.0, 60.0]
    for wrong, says in (("", "no arrival"), ("a\nb\n", "Line 2"), ("1,x\n", "Line 1"), ("1,-4\n", "Line 1")):
        with pytest.raises(BadRequest, match=says):
            arrivals.from_csv(wrong)
    with pytest.raises(BadRequest, match="too many to replay"):
        arrivals.from_csv("1,2999999\n2,2999999\n")


def test_recorded_seconds_are_spread():
    assert arrivals.recorded({100: 2, 103: 1}, 100) == [0.0, 0.5, 3.0]


def test_kedas_formula():
    """It is ceil(queue / value) every 15 s, unchanged within a tenth, at most doubled, down after 5 min."""
    keda, current, wishes = Keda(value=10.0), 1, {}
    for second in range(1200):
        outstanding = 95 if 60 <= second < 200 else 3
        current = keda.desired(FleetView(float(second), outstanding, current, current))
        wishes[second] = current
    assert wishes[59] == 1
    assert wishes[74] == 5, "four more at a time"
    assert wishes[75] == 10
    assert wishes[480] == 10
    assert wishes[520] == 1
    assert Keda(10.0).desired(FleetView(0.0, 105, 10, 10)) == 10, "within the tolerance"
    idle = Keda(10.0)
    assert [idle.desired(FleetView(float(s), 0, 1, 1)) for s in (1, 290, 310)] == [1, 1, 0]
    assert Keda(10.0).desired(FleetView(1.0, 3, 0, 0)) == 1


def test_knatives_formula():
    """It uses the mean of a minute, or of 6 s in a panic, which removes no replica."""
    knative, current, wishes = Knative(target=10.0), 1, {}
    for second in range(600):
        outstanding = 100 if 100 <= second < 130 else 5
        current = knative.desired(FleetView(float(second), outstanding, current, current))
        wishes[second] = current
    assert wishes[99] == 1
    assert wishes[108] == 10, "a panic of six seconds"
    assert wishes[160] == 10, "it ends a minute after"
    assert wishes[230] == 1
    calm = Knative(10.0)
    assert [calm.desired(FleetView(float(s), 0, 1, 1)) for s in (1, 20, 40)] == [1, 1, 0]


def test_figures():
    assert percentile([], 99) == 0.0
    assert [percentile([1.0, 2.0, 3.0, 4.0], p) for p in (50, 75, 99)] == [2.0, 3.0, 4.0]
    found = replay([0.1, 0.2], ours(), ReplicaTiming(call_ms=100.0), seconds=2.0, start_at=START)
    figures = summary(found, 50.0, None)
    assert figures["cost"] is None
    assert figures["late"] == 0
    assert math.isclose(figures["replica_hours"], 2 / 3600)
    assert len(timeline(found, 2.0)["at"]) == 4
    assert datetime.fromtimestamp(START, UTC).year == 2023
