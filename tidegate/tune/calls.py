"""Read from the worker's counters how many requests shared a model call."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

METRIC = "tidegate_worker_call_requests"
TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True)
class Calls:
    """The number of model calls since the worker's start, and the number of requests in these calls."""

    calls: float
    requests: float

    def mean_since(self, before: Calls) -> float | None:
        """Return the mean number of requests in a call since ``before``; None if no call was made."""
        calls = self.calls - before.calls
        return (self.requests - before.requests) / calls if calls > 0 else None


def parse(text: str) -> Calls | None:
    """Return the counters in a page of Prometheus metrics; None if the page lacks them."""
    found = {}
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        found[name] = value
    try:
        return Calls(float(found[f"{METRIC}_count"]), float(found[f"{METRIC}_sum"]))
    except (KeyError, ValueError):
        return None


def read(replica: Mapping[str, Any]) -> Calls | None:
    """Return a replica's counters; None if they cannot be read.

    For example, the counters of a replica on another host cannot be read.
    """
    import httpx

    from tidegate.kernel.http.certificates import trusted

    if replica["host"] != socket.gethostname() or not replica["metrics_port"]:
        return None
    url = f"http://127.0.0.1:{replica['metrics_port']}/metrics"
    try:
        return parse(httpx.get(url, timeout=TIMEOUT_S, trust_env=False, verify=trusted(url)).text)
    except httpx.HTTPError:
        return None
