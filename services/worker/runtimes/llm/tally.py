"""Count the calls and the tokens of an engine. All engines are counted in the same way."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from calls import Call


class Tally:
    """Counts of waiting calls, running calls and tokens of an engine.

    ``plan``: see ``model.py``.
    """

    def __init__(self, plan: dict[str, Any]) -> None:
        self._slots, self._kv_total = plan["slots"], plan.get("kv_total")
        self._lock = threading.Lock()
        self._running: dict[int, Call] = {}
        self._waiting = 0
        self._ended = [0, 0, 0]

    @contextmanager
    def slot(self, call: Call, slots: threading.Semaphore) -> Iterator[None]:
        """Wait for an engine slot. Release the slot at the end of the ``with`` block."""
        with self._lock:
            self._waiting += 1
        slots.acquire()
        with self._lock:
            self._waiting -= 1
            self._running[id(call)] = call
        try:
            yield
        finally:
            try:
                with self._lock:
                    del self._running[id(call)]
                    self._ended = _added(self._ended, call.usage)
            finally:
                slots.release()

    def stats(self) -> dict[str, Any]:
        """Return the fields of ``tidegate.kernel.protocol.presence.EngineReport``."""
        with self._lock:
            running = [call.usage for call in self._running.values()]
            waiting, totals = self._waiting, self._ended
        for usage in running:
            totals = _added(totals, usage)
        return {
            "slots": self._slots,
            "running": len(running),
            "waiting": waiting,
            "kv_used": sum(prompt + answer for prompt, answer, _ in running),
            "kv_total": self._kv_total,
            "prompt_tokens": totals[0],
            "answer_tokens": totals[1],
            "cached_tokens": totals[2],
        }


def _added(totals: list[int], usage: list[int]) -> list[int]:
    return [a + b for a, b in zip(totals, usage, strict=True)]
