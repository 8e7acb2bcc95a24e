"""Calls to light models leave together; no other call waits."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from services.gateway.api.grpc.call_grouper import MIN_IN_FLIGHT, CallGrouper
from services.gateway.api.grpc.inference import GrpcInference
from services.gateway.application.inference.core import InferenceResult, Timing
from services.gateway.domain.contract import Decoded
from tests.conftest import PATIENCE_S
from tidegate.kernel.protocol.access import ANONYMOUS
from tidegate.kernel.protocol.envelope import OK, Reply
from tidegate.kernel.triton_protocol import pb

pytestmark = pytest.mark.unit


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def busy(*, light: bool = True, hold_s: float = 60.0) -> CallGrouper:
    """Put as many calls in flight as make other calls wait."""
    company = CallGrouper(hold_s)
    company.learn(10_000 if not light else 1_000, 1)
    for _ in range(MIN_IN_FLIGHT):
        await company.join()
    return company


async def test_a_call_leaves_at_once_if_few_are_in_flight():
    company = CallGrouper()
    company.learn(100, 1)
    for _ in range(MIN_IN_FLIGHT):
        join = asyncio.ensure_future(company.join())
        await turns()
        assert join.done()


async def test_a_call_to_a_heavy_model_leaves_at_once():
    company = await busy(light=False)
    join = asyncio.ensure_future(company.join())
    await turns()
    assert join.done()


async def test_a_shared_model_call_counts_per_request():
    company = await busy(light=False)
    company.learn(100_000, 64)
    join = asyncio.ensure_future(company.join())
    await turns()
    assert not join.done()
    company.leave()
    await join


async def test_waiting_calls_leave_together_when_one_is_answered():
    company = await busy()
    joins = [asyncio.ensure_future(company.join()) for _ in range(3)]
    await turns()
    assert not any(join.done() for join in joins)
    company.leave()
    await turns()
    assert all(join.done() for join in joins)


async def test_the_wait_is_bounded():
    company = await busy(hold_s=0.002)
    async with asyncio.timeout(PATIENCE_S):
        await company.join()


async def test_a_cancelled_call_does_not_affect_the_others():
    company = await busy()
    gone, stays = (asyncio.ensure_future(company.join()) for _ in range(2))
    await turns()
    gone.cancel()
    await turns()
    company.leave()
    await turns()
    assert gone.cancelled()
    assert stays.done()


class Core:
    """The inference core: it keeps the order in which calls reach it, and answers them on demand."""

    def __init__(self) -> None:
        self.order: list[Any] = []
        self.calls: list[asyncio.Future[int]] = []
        self.feedback = SimpleNamespace(endpoints=())

    def find(self, model: str, version: str) -> None:
        """Find every model."""

    async def infer(self, *arguments: Any) -> InferenceResult:
        self.order.append(arguments[4])  # the trace
        self.calls.append(asyncio.get_running_loop().create_future())
        compute_us = await self.calls[-1]
        reply = Reply(b"", OK, 0, 0, 1, 0, compute_us, 1, b"", [])
        decoded = Decoded("", 1, b"", [], None, False)
        return InferenceResult(cast(Any, ROUTE), decoded, 1, (), {}, reply, Timing())


ROUTE = SimpleNamespace(name="sums-v1", version="1")


async def test_requests_of_a_sequence_stay_in_order():
    """A later request overtook an earlier one, if the model had just become slow."""
    core, nothing = Core(), SimpleNamespace(answered=lambda *_: None, labels=lambda _: None)
    access = SimpleNamespace(admit=lambda *_: None)
    inference = GrpcInference(cast(Any, core), cast(Any, access), cast(Any, nothing), cast(Any, nothing))
    tasks = list[asyncio.Task[Any]]()

    def call(trace: bytes, sequence: int = 0) -> None:
        request = pb.ModelInferRequest(model_name="sums")
        if sequence:
            request.parameters["sequence_id"].int64_param = sequence
        tasks.append(asyncio.create_task(inference.answer(request, ANONYMOUS, "", None, 0.0, {}, trace)))

    call(b"teaches")
    await turns()
    core.calls[0].set_result(100)
    await tasks[0]
    for _ in range(MIN_IN_FLIGHT):
        call(b"in flight")
    call(b"alone waits")
    await turns()
    assert core.order[1:] == [b"in flight"] * MIN_IN_FLIGHT
    call(b"first", sequence=7)
    await turns()
    core.calls[1].set_result(60_000)
    call(b"second", sequence=7)
    await turns()
    assert [each for each in core.order if each in (b"first", b"second")] == [b"first", b"second"]
    assert b"alone waits" in core.order
    for each in core.calls[2:]:
        each.set_result(100)
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*tasks)
