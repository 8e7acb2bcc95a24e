"""Admission: which requests may wait, and when the others should retry."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.domain.admission import (
    RESERVE,
    predicted_wait_ms,
    refusal,
    state,
    too_late,
)
from services.gateway.domain.fair_lane import FlowLoad, Standing
from services.gateway.domain.replica_fleet import (
    UNKNOWN_FLEET,
    LoadElsewhere,
    ReplicaFault,
    ReplicaFleet,
    fleets,
    loads_elsewhere,
    replica_fault,
)
from tidegate.kernel.errors import ColdStart, DeadlinePassed, NoCapacity, Overloaded, TidegateError
from tidegate.kernel.protocol.presence import GatewayLoad, GatewayReport, GatewayView, ReplicaReport

pytestmark = pytest.mark.unit


def decide(**given_: Any) -> TidegateError | None:
    usual = {
        "outstanding": 0,
        "max_queue": 100,
        "wakeable": True,
        "fleet": ReplicaFleet(2, 10.0),
        "timeout_ms": 1000,
        "name": "d",
    }
    return refusal(**{**usual, **given_})


def told(**given_: Any) -> tuple[type, str, float | None]:
    found = decide(**given_)
    assert found is not None
    return type(found), found.message, found.retry_after_s


def test_there_is_room():
    assert decide() is None
    assert decide(outstanding=99) is None


def test_a_request_wakes_a_model_at_zero_replicas():
    assert decide(fleet=UNKNOWN_FLEET) is None
    assert decide(fleet=UNKNOWN_FLEET, outstanding=99, timeout_ms=1) is None


def test_a_request_is_admitted_without_a_measurement():
    assert decide(fleet=ReplicaFleet(1, None), outstanding=99, timeout_ms=1) is None


def test_a_deployment_held_at_zero_replicas_is_refused():
    assert told(fleet=UNKNOWN_FLEET, wakeable=False) == (
        NoCapacity,
        "d has no replica and may not start one, because an operator holds it at 0 replicas. To change that: "
        "`tidegate scale d --auto`",
        30.0,
    )
    assert decide(wakeable=False) is None, "a draining replica still answers"


def test_a_deployment_that_cannot_start_is_refused():
    kind, message, _ = told(fleet=ReplicaFleet(0, fault="no such file"))
    assert (kind, message) == (NoCapacity, "d has no replica: no such file")
    assert decide(fleet=ReplicaFleet(1, 1.0, fault="no such file")) is None, "a replica is ready"


def test_a_start_that_takes_too_long():
    kind, message, retry = told(fleet=ReplicaFleet(0, start_ms=5000.0), timeout_ms=4999)
    assert (kind, retry) == (ColdStart, 5.0)
    assert message.startswith(
        "d needs 5000 ms more to start, but the request has 4999 ms left: set a longer timeout"
    )
    assert decide(fleet=ReplicaFleet(0, start_ms=5000.0), timeout_ms=5000) is None
    assert decide(fleet=ReplicaFleet(1, start_ms=5000.0), timeout_ms=1) is None


def test_the_queue_is_full():
    kind, message, retry = told(outstanding=100)
    assert kind is Overloaded
    assert message.startswith("d: 100 requests already wait, and the limit is 100. Retry after")
    assert retry == pytest.approx(0.5)
    assert told(outstanding=100, fleet=UNKNOWN_FLEET)[2] == 1.0
    assert told(outstanding=60, fleet=ReplicaFleet(2, 10.0, elsewhere=40))[1].startswith(
        "d: 100 requests already wait"
    )


def test_the_wait_is_too_long():
    kind, message, retry = told(outstanding=50, timeout_ms=200)
    assert kind is Overloaded
    assert message.startswith(
        "d: the predicted wait is 250 ms, but the request has 200 ms left. Set a longer"
    )
    assert retry == pytest.approx((250 - 200 * (1 - RESERVE)) / 1e3)
    assert decide(outstanding=50, timeout_ms=250 / (1 - RESERVE) + 1) is None


def test_requests_at_other_gateways_count():
    assert decide(outstanding=10, timeout_ms=100, fleet=ReplicaFleet(2, 10.0)) is None
    assert decide(outstanding=10, timeout_ms=100, fleet=ReplicaFleet(2, 10.0, elsewhere=20)) is not None


def test_the_time_of_full_calls_is_used_if_known():
    assert predicted_wait_ms(10, ReplicaFleet(1, 10.0, 2.0)) == 20.0
    assert predicted_wait_ms(10, ReplicaFleet(1, 10.0)) == 100.0


@given(
    st.integers(0, 10_000),
    st.integers(1, 100),
    st.floats(0.001, 1e4),
    st.floats(1, 1e6),
    st.integers(1, 20_000),
    st.integers(0, 1000),
)
def test_retry_after_is_long_enough(outstanding, ready, request_ms, timeout_ms, max_queue, elsewhere):
    fleet = ReplicaFleet(ready, request_ms, elsewhere=elsewhere)
    found = decide(outstanding=outstanding, fleet=fleet, timeout_ms=timeout_ms, max_queue=max_queue)
    wait = predicted_wait_ms(outstanding, fleet)
    waiting = outstanding + elsewhere
    assert wait == pytest.approx(waiting * request_ms / ready)
    assert (found is None) == (waiting < max_queue and wait <= timeout_ms * (1 - RESERVE))
    if found is not None:
        assert found.retry_after_s is not None
        assert found.retry_after_s > 0


def report(deployment: str, state: Any = "ready", **given_: Any) -> ReplicaReport:
    return ReplicaReport("r", deployment, 1, "h", 1, state, **given_)


def test_fleets_count_ready_replicas():
    found = fleets(
        [
            report("a", call_ms=20.0, batch_mean=4.0, parallel=8),
            report("a", call_ms=10.0, parallel=4),
            report("a"),
            report("a", "draining", call_ms=1000.0),
            report("b", "starting"),
            report("c"),
            report("d", call_ms=8.0, batch_mean=0.0),
        ]
    )
    assert found == {
        "a": ReplicaFleet(3, 7.5, 2.5, parallel=13 / 3),
        "b": ReplicaFleet(),
        "c": ReplicaFleet(1, None),
        "d": ReplicaFleet(1, 8.0, 8.0),
    }


def test_a_fleet_has_the_slots_of_a_language_models_replicas():
    decoupled = {"signature": {"decoupled": True}, "parallel": 4.0, "inflight": 3}
    found = fleets([report("a", **decoupled), report("a", "draining", **decoupled), report("b")])
    assert [(each.inflight, each.slots) for each in found["a"].replicas] == [(3, 4)]
    assert found["b"].replicas == ()


def test_a_fleet_has_the_start_time_from_the_autoscaler():
    failed = {"conditions": [{"type": "Loaded", "ok": False, "message": "no such file"}]}
    starts = {
        "conditions": [{"type": "Loaded", "ok": True, "message": ""}],
        "cold_starts": [{"total_ms": ms} for ms in (9e9, 1000, 4000, 3000)],
        "replicas": [{"state": "starting", "launched_at": 98.5}, {"state": "ready", "launched_at": 1.0}],
    }
    never: dict[str, Any] = {"cold_starts": [], "replicas": []}
    found = fleets([report("up")], {}, {"bad": failed, "new": starts, "un": never, "up": failed}, 100.0)
    assert found["bad"] == ReplicaFleet(fault="no such file")
    assert found["new"] == ReplicaFleet(start_ms=2500.0)
    assert found["un"] == ReplicaFleet()
    assert found["up"] == ReplicaFleet(1), "with a ready replica the status does not matter"


def test_requests_in_flight_at_other_gateways():
    view = GatewayView(
        [
            GatewayReport("me", 1.0, {"a": GatewayLoad(outstanding=5)}),
            GatewayReport("g2", 1.0, {"a": GatewayLoad(2, flows={"m/x": [2, 3]}), "b": GatewayLoad(1)}),
            GatewayReport("g3", 1.0, {"a": GatewayLoad(4, flows={"m/x": [1, 3], "m/y": [3, 1]})}),
            GatewayReport("idle", 1.0, {"a": GatewayLoad()}),
        ]
    )
    flows = {"m/x": FlowLoad(3, 3), "m/y": FlowLoad(3, 1)}
    found = loads_elsewhere(view, "me")
    assert found == {"a": LoadElsewhere(6, flows, 2), "b": LoadElsewhere(1, {}, 1)}
    assert fleets([], found)["a"] == ReplicaFleet(elsewhere=6, flows_elsewhere=flows, gateways=3)


def test_replicas_report_how_many_requests_they_hold():
    old, new = report("a"), report("a", holds=7)
    assert fleets([new, new])["a"].holds == 14
    assert fleets([new, old])["a"].holds == 0  # a worker of an earlier version: unknown


def test_a_caller_within_its_share_is_admitted_beside_a_flood():
    """The flood fills the queue: 100 of 100 wait, 20 ms each on two replicas."""
    fleet = ReplicaFleet(2, 20.0)
    flood = {"outstanding": 100, "fleet": fleet, "timeout_ms": 500}
    assert isinstance(decide(**flood), Overloaded)
    assert isinstance(decide(**flood, standing=Standing(95, 0.5)), Overloaded)
    assert decide(**flood, standing=Standing(5, 0.5)) is None
    kind, message, retry_after_s = told(**flood, standing=Standing(50, 0.5))
    assert kind is Overloaded
    assert "50 requests of this caller already wait. The caller's share of the queue is 50 of 100" in message
    assert retry_after_s == 1.0


def test_the_wait_of_a_caller_depends_on_its_own_requests_and_share():
    """30 requests of a caller with half of two replicas need 600 ms, whatever the others send."""
    crowded = {"outstanding": 90, "fleet": ReplicaFleet(2, 20.0), "standing": Standing(30, 0.5)}
    assert decide(**crowded, timeout_ms=800) is None
    assert isinstance(decide(**crowded, timeout_ms=700), Overloaded)


def test_a_request_that_was_never_published_may_be_sent_again():
    fleet = ReplicaFleet(2, 20.0)
    late = partial(too_late, "d", passed="the deadline passed", waited_s=0.5)
    assert isinstance(late(fleet, held=None), DeadlinePassed)
    assert isinstance(late(ReplicaFleet(0), held=8), DeadlinePassed)
    assert isinstance(late(ReplicaFleet(0, fault="no file"), held=8), NoCapacity)
    error = late(fleet, held=50)
    assert (type(error), error.retry_after_s) == (Overloaded, 0.5)


AGAIN = report("a", "starting", message="Triton crashed; Triton is started again", ready_at=5.0)
NO_LOAD = {"conditions": [{"type": "Loaded", "ok": False, "reason": "LoadFailed", "message": "no such file"}]}


@pytest.mark.parametrize(
    ("reports", "status", "expected"),
    [
        ([], {}, ReplicaFault()),
        ([report("a", "starting")], {}, ReplicaFault()),
        ([AGAIN], {}, ReplicaFault(reloading="Triton crashed; Triton is started again")),
        (
            [report("a", "starting", ready_at=5.0)],
            {},
            ReplicaFault(reloading="the replica loads its model again"),
        ),
        ([report("a", "starting")], NO_LOAD, ReplicaFault("no such file", True)),
        ([AGAIN], NO_LOAD, ReplicaFault("no such file", False, AGAIN.message)),
        ([report("a", "draining")], NO_LOAD, ReplicaFault("no such file")),
        ([], NO_LOAD | {"ready": 1}, ReplicaFault("no such file")),
        ([], NO_LOAD | {"draining": 1}, ReplicaFault("no such file")),
        (
            [],
            {"conditions": [NO_LOAD["conditions"][0] | {"reason": "StartTimeout"}]},
            ReplicaFault("no such file"),
        ),
    ],
)
def test_replica_faults(reports, status, expected):
    """Requests fail early only if no replica is left that may still answer them."""
    assert replica_fault(reports, status) == expected


@pytest.mark.parametrize(
    ("wakeable", "fleet", "word", "why"),
    [
        (True, ReplicaFleet(1, fault="no such file"), "READY", ""),
        (False, ReplicaFleet(1), "READY", ""),
        (True, ReplicaFleet(), "READY", ""),
        (
            False,
            ReplicaFleet(),
            "UNAVAILABLE",
            "unloaded: an operator holds the model at 0 replicas (`tidegate resume NAME` starts it)",
        ),
        (True, ReplicaFleet(fault="no such file"), "UNAVAILABLE", "no such file"),
        (True, ReplicaFleet(reloading="Triton crashed"), "LOADING", "Triton crashed"),
    ],
)
def test_a_state_says_why_a_request_would_fail(wakeable, fleet, word, why):
    assert state(wakeable, fleet) == (word, why)
