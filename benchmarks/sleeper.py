"""The heavy model. It sleeps, so that it leaves the cores to the load generator."""

from __future__ import annotations

import json
from collections.abc import Mapping

from benchmarks import stack
from benchmarks.stack import Stack
from benchmarks.workloads import Exchange, WrongAnswer

MODEL_MS = 20.0


def deploy(running: Stack, replicas: int, max_batch: int = 1) -> None:
    """Serve the example that sleeps. A call takes the same time for 1 row and for ``max_batch`` rows."""
    path = stack.EXAMPLES / "sleep" / "model.py"
    running.deploy(path, "sleep", "--max-batch", str(max_batch), replicas=replicas)


def exchange(timeout_ms: float | None = None, model_ms: float = MODEL_MS, rows: int = 1) -> Exchange:
    """Return a request of some rows that takes the model some time, with or without a deadline."""
    tensor = {"name": "ms", "shape": [rows, 1], "datatype": "FP32", "data": [model_ms] * rows}
    headers = {"Content-Type": "application/json"}
    if timeout_ms is not None:
        headers["X-Request-Timeout-Ms"] = f"{timeout_ms:g}"

    def check(_: Mapping[str, str], answer: bytes) -> None:
        given = json.loads(answer)["outputs"][0]["data"]
        if given != [model_ms] * rows:
            raise WrongAnswer(f"slept {given}, asked for {rows} times {model_ms}")

    return Exchange("/v2/models/sleep/infer", json.dumps({"inputs": [tensor]}).encode(), check, headers)
