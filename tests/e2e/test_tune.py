"""``tidegate tune`` on a real model: measured, kept, applied, and nothing left behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import PATIENCE_S
from tests.e2e.conftest import REPO, Stack
from tidegate.cli.api import Control

TINY = ("--max-batch", "1", "--max-batch", "8", "--window-ms", "0", "--window-ms", "1", "-c", "8")


@pytest.fixture(scope="module")
def tuned(deploy_python: Callable[..., str]) -> str:
    """A model to tune, with a metric that somebody gave it."""
    return deploy_python("identity", "tuned", "--metric", "accuracy=0.98")


def wait_gone(stack: Stack, model: str) -> None:
    """Neither an object nor a replica of the measuring is left."""
    registry = Control(stack.settings).registry
    for kind in ("deployments", "endpoints"):
        assert f"{model}-tune" not in [item["name"] for item in registry.items(f"/v1/{kind}")]
    end = time.monotonic() + PATIENCE_S
    while stack.replicas(f"{model}-tune"):
        assert time.monotonic() < end, "the replica stays"
        time.sleep(0.2)


def test_measures_keeps_and_applies(stack: Stack, tuned: str, tmp_path: Path):
    picture = tmp_path / "curve.png"
    found = stack.cli(
        "tune", tuned, *TINY, "--seconds", "2", "--latency-ms", "60000", "--apply", "--png", str(picture)
    )
    settings = [(p["max_batch"], p["window_ms"]) for p in found["points"]]
    assert settings == [(1, 0.0), (8, 0.0), (8, 1.0)]
    for point in found["points"]:
        assert point["failed"] == 0
        assert point["rps"] > 1
        assert 0 < point["p50_ms"] <= point["p99_ms"]
        assert 1 <= point["batch_mean"] <= point["max_batch"]
    assert found["points"][0]["batch_mean"] == 1
    assert picture.read_bytes().startswith(b"\x89PNG")
    wait_gone(stack, tuned)

    chosen = found["chosen"]
    (version,) = stack.cli("versions", tuned)["items"]
    metrics = version["metadata"]["metrics"]
    assert metrics["accuracy"] == 0.98
    assert metrics["capacity_rps"] == pytest.approx(chosen["rps"], abs=0.001)
    assert metrics["capacity_p99_ms"] == pytest.approx(chosen["p99_ms"], abs=0.001)
    assert metrics["capacity_max_batch"] == chosen["max_batch"]
    assert metrics["capacity_window_ms"] == chosen["window_ms"]
    deployment = Control(stack.settings).registry.get(f"/v1/deployments/{tuned}-v1")
    assert deployment["batching"] == {key: chosen[key] for key in ("max_batch", "window_ms")}


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_leaves_nothing_when_it_is_stopped(stack: Stack, tuned: str, tmp_path: Path, ending: signal.Signals):
    command = [sys.executable, "-m", "tidegate.cli", "tune", tuned, "--seconds", "30", "-c", "2"]
    command += ["--png", str(tmp_path / "never.png")]
    running = subprocess.Popen(command, env=stack.env, cwd=REPO, text=True, stderr=subprocess.PIPE)
    assert running.stderr is not None
    told = ""
    while "running" not in told:
        told = running.stderr.readline()
        assert told, "it ended by itself"
    running.send_signal(ending)
    _, rest = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 130, rest
    wait_gone(stack, tuned)
    assert not (tmp_path / "never.png").exists()


def test_an_input_that_the_model_refuses(stack: Stack, tuned: str, tmp_path: Path):
    done = stack.run("tune", tuned, "--data", "[[1, 2, 3]]", "-c", "1", "--png", str(tmp_path / "never.png"))
    assert done.returncode == 1
    assert "unexpected shape" in done.stderr
    wait_gone(stack, tuned)
