"""Build a model's statistics in Triton's schema from the named counts of the workers.

Workers add their counts to one Valkey hash for each Deployment, and a gateway shows the sums. Durations are
in ns. ``success``, ``fail``, ``queue`` and ``compute_*`` count requests. The durations of ``success`` and
``fail`` begin when the worker receives a request and end with its answer. If several requests share a model
call, ``compute_*`` has the call's whole duration for each of them, as in Triton. ``execution_count``,
``batch_stats``, ``cache_hit`` and ``cache_miss`` (of Triton's response cache) count calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LAST_INFERENCE = "last_inference"
INFERENCES, EXECUTIONS = "inference_count", "execution_count"
PARTS = (
    "success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss",
)  # fmt: skip
CACHE = ("cache_hit", "cache_miss")
COMPUTE = ("compute_input", "compute_infer", "compute_output")
BATCH = "batch"

Counts = Mapping[str, int]


def count_name(part: str) -> str:
    """Return the key of the count of ``part``, such as ``success.count``."""
    return f"{part}.count"


def time_name(part: str) -> str:
    """Return the key of the total time of ``part`` in ns, such as ``success.ns``."""
    return f"{part}.ns"


def batch_part(size: int, part: str) -> str:
    """Return the name of ``part`` for calls of ``size`` rows, such as ``batch.8.compute_infer``."""
    return f"{BATCH}.{size}.{part}"


def shown(model: str, version: str, counts: Counts) -> dict[str, Any]:
    """Return an entry of Triton's ``model_stats``, made from the counts."""
    sizes = sorted({int(name.split(".")[1]) for name in counts if name.startswith(BATCH + ".")})
    return {
        "name": model,
        "version": version,
        "last_inference": counts.get(LAST_INFERENCE, 0),
        "inference_count": counts.get(INFERENCES, 0),
        "execution_count": counts.get(EXECUTIONS, 0),
        "inference_stats": {part: _duration(counts, part) for part in PARTS},
        "response_stats": {},
        "batch_stats": [
            {"batch_size": size} | {part: _duration(counts, batch_part(size, part)) for part in COMPUTE}
            for size in sizes
        ],
        "memory_usage": [],
    }


def _duration(counts: Counts, part: str) -> dict[str, int]:
    return {"count": counts.get(count_name(part), 0), "ns": counts.get(time_name(part), 0)}
