"""Grouped calls: concurrent callers share a call, and each gets its own answer."""

from __future__ import annotations

import asyncio

import pytest

from tidegate.kernel.store import grouping
from tidegate.kernel.store.grouping import Grouped

pytestmark = pytest.mark.unit


class Server:
    """A server that doubles numbers when a test lets it, and refuses groups with a negative number."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.open = asyncio.Event()
        self.open.set()

    async def __call__(self, group: list[int]) -> list[int]:
        self.calls.append(group)
        await self.open.wait()
        if min(group) < 0:
            raise ValueError("negative")
        return [number * 2 for number in group]


async def test_what_comes_during_a_call_makes_the_next():
    server = Server()
    grouped = Grouped(server)
    server.open.clear()
    first = asyncio.create_task(grouped.do(0))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    others = [asyncio.create_task(grouped.do(n)) for n in range(1, 5)]
    both = asyncio.create_task(grouped.do_all([5, 6]))
    await asyncio.sleep(0)
    server.open.set()
    assert await first == 0
    assert await asyncio.gather(*others) == [2, 4, 6, 8]
    assert await both == [10, 12]
    assert server.calls == [[0], [1, 2, 3, 4, 5, 6]]
    assert await grouped.do_all([]) == []


async def test_a_call_takes_so_many_and_so_much(monkeypatch):
    monkeypatch.setattr(grouping, "MOST_ITEMS", 3)
    monkeypatch.setattr(grouping, "MOST_BYTES", 10)
    server = Server()
    grouped = Grouped(server, size=lambda number: number)
    assert await grouped.do_all([1, 2, 3, 4, 5, 6, 100, 1]) == [2, 4, 6, 8, 10, 12, 200, 2]
    assert server.calls == [[1, 2, 3], [4, 5], [6], [100], [1]]


async def test_an_error_goes_to_all_of_its_call_and_no_further():
    grouped = Grouped(Server())
    found = await asyncio.gather(grouped.do(1), grouped.do(-1), return_exceptions=True)
    assert [str(error) for error in found] == ["negative", "negative"]
    assert await grouped.do(2) == 4


async def test_who_is_cancelled_harms_nobody():
    server = Server()
    grouped = Grouped(server)
    server.open.clear()
    tasks = [asyncio.create_task(grouped.do(n)) for n in range(3)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    tasks[1].cancel()
    await asyncio.sleep(0)
    server.open.set()
    await asyncio.wait(tasks)
    assert (await tasks[0], await tasks[2]) == (0, 4)
    assert tasks[1].cancelled()
    await grouped.stop()
