"""Helpers for tests of a gateway process: a route table, a model that answers, waits for the start."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import httpx

from tests.conftest import PATIENCE_S
from tidegate.kernel.broker.topology import requests_queue
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Request

SIGNATURE = {
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [2]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [2]}],
    "max_batch_size": 8,
}


def echo(request: Request) -> bytes:
    """Answer as the identity model: return input ``x`` as output ``y``."""
    inputs = envelope.read_call_key(request.key).inputs
    key = envelope.result_key((inputs[0]._replace(name="y"),))
    return envelope.reply_frame(
        request.id, request.attempt, request.rows, key, list(request.data[:1]), wait_us=100, compute_us=200
    )


def make_table(deployment: str, **given: Any) -> dict[str, Any]:
    """Return a route table with an endpoint ``digits`` on one Deployment."""
    entry = {
        "model": "digits",
        "version": 1,
        "queue": requests_queue(deployment).name,
        "format": "onnx",
        "signature": SIGNATURE,
        "max_queue": 10_000,
        "retry": "safe",
        "wakeable": True,
        "ready": 1,
        **given,
    }
    endpoint = {
        "targets": [{"deployment": deployment, "weight": 100}],
        "versions": {"1": deployment},
        "default_timeout_ms": 120_000,
    }
    return {"epoch": "e", "n": 1, "endpoints": {"digits": endpoint}, "deployments": {deployment: entry}}


def make_table_with_feedback(deployment: str, **given: Any) -> dict[str, Any]:
    """Return a table whose endpoint collects feedback."""
    found = make_table(deployment, **given)
    found["endpoints"]["digits"]["feedback"] = True
    return found


def wait_ready(process: subprocess.Popen[bytes], port: int, log: Path, scheme: str = "http") -> None:
    """Return once a service that was just started says that it is ready."""
    end = time.monotonic() + PATIENCE_S
    while process.poll() is None and time.monotonic() < end:
        try:
            if httpx.get(f"{scheme}://127.0.0.1:{port}/health/ready", verify=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.02)
    raise AssertionError(log.read_text())


def wait_listening(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Return once a service that was just started answers, ready or not."""
    end = time.monotonic() + PATIENCE_S
    while process.poll() is None and time.monotonic() < end:
        try:
            httpx.get(f"http://127.0.0.1:{port}/health/live")
            return
        except httpx.TransportError:
            time.sleep(0.02)
    raise AssertionError(log.read_text())
