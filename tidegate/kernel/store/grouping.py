"""Group items of concurrent callers into one call. Items that arrive during a call wait for the next call."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

MOST_ITEMS = 256
MOST_BYTES = 4 * 2**20


class Grouped(Generic[T, R]):
    """A queue that passes its items to ``run`` in groups.

    ``run`` returns an answer for each item, in order. If ``run`` raises an error, every caller in the group
    gets this error. ``size`` returns the number of bytes of an item. A group has at most ``MOST_ITEMS`` items
    and at most ``MOST_BYTES`` bytes. An item with more than ``MOST_BYTES`` bytes gets a group of its own. If
    a caller is cancelled, ``run`` still gets the caller's item.
    """

    def __init__(
        self, run: Callable[[list[T]], Awaitable[Sequence[R]]], size: Callable[[T], int] = lambda _: 0
    ) -> None:
        self._run = run
        self._size = size
        self._waiting: deque[tuple[T, asyncio.Future[R]]] = deque()
        self._task: asyncio.Task[None] | None = None

    async def do(self, item: T) -> R:
        """Return the answer for one item."""
        return await self._put(item)

    async def do_all(self, items: Sequence[T]) -> list[R]:
        """Return the answers for several items, in order."""
        futures = [self._put(item) for item in items]
        try:
            return [await future for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
                future.add_done_callback(_seen)
            raise

    async def stop(self) -> None:
        """Wait until every item has its answer."""
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)

    def _put(self, item: T) -> asyncio.Future[R]:
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._task is None:
            self._task = asyncio.create_task(self._work(), name="grouped")
        return future

    async def _work(self) -> None:
        try:
            while self._waiting:
                group = self._group()
                try:
                    answers = await self._run([item for item, _ in group])
                except Exception as error:
                    for _, future in group:
                        if not future.done():
                            future.set_exception(error)
                    continue
                for (_, future), found in zip(group, answers, strict=True):
                    if not future.done():
                        future.set_result(found)
        finally:
            self._task = None

    def _group(self) -> list[tuple[T, asyncio.Future[R]]]:
        group: list[tuple[T, asyncio.Future[R]]] = []
        size = 0
        while self._waiting and len(group) < MOST_ITEMS:
            size += self._size(self._waiting[0][0])
            if group and size > MOST_BYTES:
                break
            group.append(self._waiting.popleft())
        return group


def _seen(future: asyncio.Future[R]) -> None:
    if not future.cancelled():
        future.exception()
