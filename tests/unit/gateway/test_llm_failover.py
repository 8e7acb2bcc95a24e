"""Another target for a request whose engine cannot work now."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import replace
from functools import partial
from typing import Any, cast

import pytest

from services.gateway.application.inference.core import Timing
from services.gateway.application.llm.core import LlmCall, LlmCore, LlmEvents
from services.gateway.domain.contract import Decoded
from services.gateway.domain.llm.failover import other_target
from services.gateway.domain.llm.refusal import EngineRefused
from services.gateway.domain.replica_choice import ReplicaSlots
from services.gateway.domain.replica_fleet import ReplicaFleet
from services.gateway.domain.routing import DeploymentRoute, EndpointRoute, parse_table
from services.gateway.domain.traffic_split import Origin, TrafficRule
from tidegate.kernel.errors import Overloaded, TidegateError, TooMany
from tidegate.kernel.protocol.llm import Meta

pytestmark = pytest.mark.unit


def endpoint(**ready: int) -> EndpointRoute:
    def deployment(count: int) -> dict[str, object]:
        llm = {"context": None, "adapters": ["legal"], "slots": 4, "created": 0}
        return {
            "model": "m", "version": 1, "format": "llm", "signature": None, "max_queue": 10, "retry": "safe",
            "wakeable": True, "ready": count, "llm": llm,
        }  # fmt: skip

    targets = [{"deployment": name, "weight": 50} for name in ready]
    one = {
        "targets": targets, "versions": {}, "default_timeout_ms": 1000, "withheld": {}, "rules": [],
        "sticky": None,
    }  # fmt: skip
    table = {
        "epoch": "1", "n": 1, "endpoints": {"chat": one},
        "deployments": {name: deployment(count) for name, count in ready.items()},
    }  # fmt: skip
    return parse_table(table).endpoints["chat"]


def other(found: EndpointRoute, failed: list[str], status: int = 503, adapter: str = "") -> str | None:
    route = other_target(found, failed, status, adapter)
    return route.name if route else None


def test_a_ready_target_that_has_not_failed_gets_the_request():
    assert other(endpoint(far=1, asleep=0, own=1), ["far"]) == "own"
    assert other(endpoint(far=1, own=1), ["far", "own"]) is None
    assert other(endpoint(far=1, asleep=0), ["far"]) is None


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500])
def test_other_refusals_are_the_answer(status: int):
    assert other(endpoint(far=1, own=1), ["far"], status) is None


def test_a_request_over_the_limits_of_an_upstream_goes_to_the_failover_only():
    found = endpoint(far=1, own=1, spare=1, asleep=0)
    routes = {route.name: route for route in found.targets}
    shared = replace(
        found,
        targets=(routes["far"], routes["own"]),
        failover=(routes["asleep"], routes["spare"]),
    )
    assert other(shared, ["far"], 429) == "spare"
    assert other(shared, ["far", "spare"], 429) is None
    assert other(shared, ["far"], 503) == "own"
    assert other(shared, ["far"], 429, adapter="medical") is None


async def test_a_request_that_a_rule_sent_stays_at_its_target(monkeypatch):
    """The rule may keep a caller's data away from the other targets."""
    targets = endpoint(own=1, far=1)
    chat = replace(targets, rules=((TrafficRule(b"x-private", None, None), targets.targets[0]),))
    core = LlmCore(cast(Any, None), cast(Any, None))
    tried: list[str] = []

    async def run(
        _: LlmCall, __: EndpointRoute, route: DeploymentRoute, *args: Any, **options: Any
    ) -> AsyncGenerator[LlmEvents]:
        tried.append(route.name)
        raise EngineRefused(503, b"")
        yield

    monkeypatch.setattr(core, "_run", run)
    for headers, expected in (({b"x-private": b"1"}, ["own"]), ({}, ["own", "far"])):
        tried.clear()
        call, origin = LlmCall("chat", "/v1/completions", {}), partial(Origin, headers, "", dict)
        with pytest.raises(EngineRefused):
            await anext(core._continued(call, chat, chat.targets[0], origin))
        assert tried == expected


@pytest.mark.parametrize(
    ("second", "tried"),
    [
        (EngineRefused(503, b""), ["own", "spare", "last"]),
        (EngineRefused(400, b""), ["own", "spare", "last"]),
        (TooMany("its budget is used up", reason="budget_exhausted"), ["own", "spare", "last"]),
    ],
)
async def test_a_request_over_a_limit_stays_with_the_failover_and_its_caller_gets_the_429(
    monkeypatch, second: TidegateError, tried: list[str]
):
    found = endpoint(own=1, far=1, spare=1, last=1)
    own, far, spare, last = found.targets
    chat = replace(found, targets=(own, far), failover=(spare, last))
    core, origin = LlmCore(cast(Any, None), cast(Any, None)), partial(Origin, {}, "", dict)
    failures: list[str] = []

    async def run(
        _: LlmCall, __: EndpointRoute, route: DeploymentRoute, *args: Any, **options: Any
    ) -> AsyncGenerator[LlmEvents]:
        failures.append(route.name)
        raise EngineRefused(429, b"", 7.0) if route.name == "own" else second
        yield

    monkeypatch.setattr(core, "_run", run)
    with pytest.raises(EngineRefused) as caught:
        await anext(core._continued(LlmCall("chat", "/v1/completions", {}), chat, own, origin))
    assert failures == tried
    assert (caught.value.status, caught.value.retry_after_s) == (429, 7.0)


async def test_a_stream_that_breaks_off_after_a_failover_ends_with_its_own_error(monkeypatch):
    found = endpoint(own=1, spare=1)
    own, spare = found.targets
    chat = replace(found, targets=(own,), failover=(spare,))
    core, origin = LlmCore(cast(Any, None), cast(Any, None)), partial(Origin, {}, "", dict)
    first = LlmEvents([b"{}"], Meta(), Timing(), spare, Decoded("", 0, b"", [], None, False))

    async def run(
        _: LlmCall, __: EndpointRoute, route: DeploymentRoute, *args: Any, **options: Any
    ) -> AsyncGenerator[LlmEvents]:
        if route.name == "own":
            raise EngineRefused(429, b"", 7.0)
        yield first
        raise EngineRefused(502, b"")

    monkeypatch.setattr(core, "_run", run)
    answers = core._continued(LlmCall("chat", "/v1/completions", {}), chat, own, origin)
    assert await anext(answers) is first
    with pytest.raises(EngineRefused) as caught:
        await anext(answers)
    assert caught.value.status == 502


async def test_another_target_admits_the_request_in_its_own_band_or_the_first_failure_is_the_answer(
    monkeypatch,
):
    chat, call = endpoint(own=1, far=1), LlmCall("chat", "/v1/completions", {})
    core, origin = LlmCore(cast(Any, None), cast(Any, None)), partial(Origin, {}, "", dict)
    tried: list[tuple[str, bool]] = []

    async def run(
        _: LlmCall, __: EndpointRoute, route: DeploymentRoute, *args: Any, again: bool
    ) -> AsyncGenerator[LlmEvents]:
        tried.append((route.name, again))
        raise EngineRefused(503, b"") if route.name == "own" else Overloaded("far has no room")
        yield

    monkeypatch.setattr(core, "_run", run)
    with pytest.raises(EngineRefused):
        await anext(core._continued(call, chat, chat.targets[0], origin))
    assert tried == [("own", False), ("far", False)]
    with pytest.raises(Overloaded):
        await anext(core._continued(call, chat, chat.targets[1], origin))


def test_the_other_target_has_the_adapter():
    assert other(endpoint(far=1, own=1), ["far"], adapter="legal") == "own"
    assert other(endpoint(far=1, own=1), ["far"], adapter="medical") is None


@pytest.mark.parametrize("retry_safe", [True, False])
async def test_only_a_request_that_may_run_twice_waits_in_the_queue_of_a_replica(retry_safe: bool):
    """If the replica dies, the broker moves its message to the shared queue, and another replica runs it."""
    placed: list[tuple[str | None, float]] = []

    class Inference:
        def fleet(self, name: str) -> ReplicaFleet:
            return ReplicaFleet(ready=2, replicas=(ReplicaSlots("a", 0, 4), ReplicaSlots("b", 0, 4)))

        async def stream_from(self, *_: Any, replica: str | None, wait_ms: float, **__: Any) -> Any:
            placed.append((replica, wait_ms))
            return
            yield

    core = LlmCore(cast(Any, Inference()), cast(Any, None))
    chat = endpoint(own=2)
    target = chat.targets[0]
    assert target.llm is not None
    route = replace(target, retry_safe=retry_safe, llm=replace(target.llm, affinity_wait_ms=100.0))
    call = LlmCall("chat", "/v1/completions", {"prompt": "x" * 10_000})
    assert [each async for each in core._run(call, chat, route, 1000.0, None, again=False)] == []
    ((replica, wait_ms),) = placed
    assert ((replica in ("a", "b")), wait_ms > 0) == (retry_safe, retry_safe)
