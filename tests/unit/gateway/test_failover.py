"""The failover of requests with tensors whose Deployment cannot answer."""

from __future__ import annotations

import time
from typing import Any, cast

import pytest

from services.gateway.application.inference.failover import Failover, elsewhere
from services.gateway.domain.contract import Decoded
from services.gateway.domain.fair_lane import FlowKey
from services.gateway.domain.routing import EndpointRoute, parse_table
from services.gateway.domain.traffic_split import Origin
from tidegate.kernel.errors import (
    ColdStart,
    ModelFailed,
    NoCapacity,
    Overloaded,
    TidegateError,
    UpstreamUnavailable,
)

pytestmark = pytest.mark.unit

GONE = UpstreamUnavailable("the upstream is not available")


def signature(shape: list[int]) -> dict[str, Any]:
    tensor = {"name": "x", "datatype": "FP32", "shape": shape}
    return {"inputs": [tensor], "outputs": [tensor], "max_batch_size": 8}


def endpoint(rules: list[dict[str, Any]] | None = None, **ready: int) -> EndpointRoute:
    """One with the targets ``own`` and ``far``, and ``spare`` and ``odd`` (other tensors) as its failover."""

    def deployment(name: str) -> dict[str, Any]:
        return {
            "model": "m", "version": 1, "format": "oip" if name == "far" else "onnx", "max_queue": 10,
            "signature": signature([5] if name == "odd" else [4]), "retry": "safe", "wakeable": True,
            "ready": ready.get(name, 0), "upstream": name == "far",
        }  # fmt: skip

    one = {
        "targets": [{"deployment": name, "weight": 50} for name in ("own", "far")], "versions": {},
        "default_timeout_ms": 1000, "withheld": {}, "rules": rules or [], "sticky": None,
        "failover": ["odd", "spare", "deleted"],
    }  # fmt: skip
    names = ("own", "far", "odd", "spare")
    table = {"epoch": "1", "n": 1, "endpoints": {"m": one}, "deployments": {n: deployment(n) for n in names}}
    return parse_table(table).endpoints["m"]


def chosen(error: TidegateError = GONE, failed: tuple[str, ...] = ("far",), **ready: int) -> str | None:
    found = endpoint(None, **ready)
    try:
        return elsewhere(found, found.targets[1], set(failed), error, None).name
    except type(error):
        return None


def test_ready_targets_come_before_the_failover_and_only_if_they_take_the_same_tensors():
    assert chosen(own=1, far=1, spare=1, odd=1) == "own"
    assert chosen(own=0, far=1, spare=1, odd=1) == "spare"
    assert chosen(own=1, far=1, spare=1, failed=("far", "own")) == "spare"
    assert chosen(far=1, odd=1) is None


@pytest.mark.parametrize("error", [ModelFailed("no"), Overloaded("full")])
def test_other_failures_stay(error):
    assert chosen(error, own=1, far=1, spare=1) is None


@pytest.mark.parametrize("error", [NoCapacity("held at 0"), ColdStart("slow")])
def test_a_missing_replica_is_a_reason(error):
    assert chosen(error, ("own",), far=0, spare=1) == "spare"


@pytest.mark.parametrize("error", [NoCapacity("held at 0"), ColdStart("slow")])
def test_the_share_of_a_missing_replica_does_not_go_to_other_targets_by_itself(error):
    """``when_unready`` decides that."""
    assert chosen(error, ("own",), far=1) is None
    assert chosen(error, ("own",), far=1, spare=1) == "spare"


def test_a_rule_keeps_its_requests():
    found = endpoint([{"header": "X-Private", "value": None, "deployment": "far"}], own=1, far=1)
    private = Origin({b"x-private": b"1"}, "", dict)
    with pytest.raises(UpstreamUnavailable):
        elsewhere(found, found.targets[1], {"far"}, GONE, lambda: private)
    assert elsewhere(found, found.targets[1], {"far"}, GONE, lambda: Origin({}, "", dict)).name == "own"


class Core:
    """Admits requests to ``own``, and remembers what was sent."""

    def __init__(self) -> None:
        self.sent: list[str] = []

    def admit(self, route: Any, timeout_ms: float, flow: FlowKey) -> None:
        if route.name != "own":
            raise Overloaded("full")

    def send(self, endpoint: Any, route: Any, *_: Any) -> bytes:
        self.sent.append(route.name)
        return b"id"


def attempt(found: EndpointRoute, seconds: float) -> tuple[Core, list[Any], Failover]:
    core, outcomes = Core(), list[Any]()
    request = Decoded("", 1, b"k", [b"data"], None, False)
    failover = Failover(
        cast(Any, core), found, found.targets[1], request, b"", time.monotonic() + seconds,
        FlowKey("m", "a"), None, outcomes.append,
    )  # fmt: skip
    return core, outcomes, failover


def test_a_request_is_sent_elsewhere_once_and_its_second_failure_is_the_answer():
    core, outcomes, failover = attempt(endpoint(own=1, far=1, spare=1), 60)
    failover.on_outcome(GONE)
    assert (core.sent, outcomes) == (["own"], [])
    failover.on_outcome(GONE)  # the spare has no room
    assert (core.sent, outcomes) == (["own"], [GONE])


def test_without_time_or_another_target_the_failure_is_the_answer():
    for found, seconds in ((endpoint(own=1, far=1), -1.0), (endpoint(far=1), 60.0)):
        core, outcomes, failover = attempt(found, seconds)
        failover.on_outcome(GONE)
        assert (core.sent, outcomes) == ([], [GONE])
