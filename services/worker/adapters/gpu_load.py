"""Read the utilization and the memory of the worker's GPUs from Triton's metrics."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable

import httpx

from tidegate.kernel import tasks

EVERY_S = 2.0
TIMEOUT_S = 1.0
# If this many readings in a row report no GPU, the replica has none, and the reading stops.
LOOKS_WITHOUT = 3

_SAMPLE = re.compile(r"^(nv_gpu_utilization|nv_gpu_memory_used_bytes)\{[^}]*\} ([0-9.eE+-]+)$", re.MULTILINE)


def read(metrics: str) -> tuple[float, int] | None:
    """Return the mean utilization of all GPUs (0 to 1), and the sum of their used memory in bytes.

    Return None if the metrics contain no GPU.
    """
    found: dict[str, list[float]] = {}
    for name, value in _SAMPLE.findall(metrics):
        found.setdefault(name, []).append(float(value))
    busy = found.get("nv_gpu_utilization")
    if not busy:
        return None
    return sum(busy) / len(busy), int(sum(found.get("nv_gpu_memory_used_bytes", [])))


class GpuLoad:
    """The load of the GPUs, read every two seconds.

    ``port``: a function that returns the port of Triton's metrics, or 0 if Triton does not run.
    ``utilization`` (0 to 1) and ``memory_bytes`` are None without a GPU.
    """

    def __init__(self, port: Callable[[], int]) -> None:
        self._port = port
        self._task: asyncio.Task[None] | None = None
        self.utilization: float | None = None
        self.memory_bytes: int | None = None

    def start(self) -> None:
        """Start reading."""
        self._task = asyncio.create_task(self._run(), name="gpus")

    async def stop(self) -> None:
        """Stop reading."""
        await tasks.end(self._task)

    async def _run(self) -> None:
        looks = 0
        # No certificate is needed, because Triton's metrics are on this host and not encrypted.
        async with httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False, verify=False) as http:
            while looks < LOOKS_WITHOUT:
                port = self._port()
                found = await _look(http, port) if port else None
                if found is not None:
                    load = read(found)
                    self.utilization, self.memory_bytes = load if load else (None, None)
                    looks = 0 if load else looks + 1
                await asyncio.sleep(EVERY_S)


async def _look(http: httpx.AsyncClient, port: int) -> str | None:
    try:
        answer = await http.get(f"http://127.0.0.1:{port}/metrics")
    except httpx.HTTPError:
        return None
    return answer.text if answer.status_code == 200 else None
