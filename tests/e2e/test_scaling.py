"""Policies, explanations, replays and healing on real workers, by the commands that operators type."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from tests.conftest import PATIENCE_S
from tests.e2e.conftest import REPO, Stack
from tests.e2e.test_resilience import wait_until
from tests.e2e.test_scale import wait_replicas
from tidegate import Client
from tidegate.kernel.errors import TidegateError

NAME = "napper-v1"


# How many requests each call of `naps` has sent. Tests may run in any order, and all of them are recorded.
sent: list[int] = []


def naps(client: Client, count: int, ms: float) -> list[Any]:
    """So many requests at once that each take the model ``ms``."""
    sent.append(count)
    x = np.full((1, 1), ms, np.float32)
    with ThreadPoolExecutor(count) as pool:
        return [f.result() for f in [pool.submit(client.infer, "napper", {"ms": x}) for _ in range(count)]]


@pytest.fixture(scope="module")
def napper(stack: Stack, deploy_python: Callable[..., str]) -> Iterator[str]:
    """The example that sleeps, one request in a call, with one replica that may become two."""
    limits = ("--min", "1", "--max", "2", "--max-batch", "1", "--target-wait-ms", "100")
    deploy_python("sleep", "napper", *limits)
    yield NAME
    stack.cli("delete", "napper", "--yes")
    wait_replicas(stack, NAME, 0)


def patch(stack: Stack, changes: dict[str, Any]) -> None:
    """Change a Deployment's options in the registry."""
    headers = {"Authorization": f"Bearer {stack.settings.service_token}"}
    url = f"{stack.settings.registry_url}/v1/deployments/{NAME}"
    httpx.patch(url, json=changes, headers=headers, trust_env=False).raise_for_status()


def is_over(process: psutil.Process) -> bool:
    return process.info["status"] == psutil.STATUS_ZOMBIE


def replica_of(process: psutil.Process) -> str:
    """Whose process it is: empty for one that is none of ours, or over by now as others' are at any time."""
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return str(process.environ().get("TIDEGATE_REPLICA", ""))
    return ""


def explained(why: dict[str, Any]) -> bool:
    """Whether the decision at hand is one for two replicas, with the demand that it is for."""
    needs = [need["replicas"] for need in why["needs"]]
    return bool(why["signals"] and why["signals"]["demand"] and max(needs, default=0) >= 2)


def triton_of(pid: int) -> psutil.Process:
    (found,) = [p for p in psutil.Process(pid).children() if p.name() == "tritonserver"]
    return found


def test_load_scales_up_and_every_decision_can_be_explained_and_made_again(
    stack: Stack, napper: str, client: Client, tmp_path: Path
) -> None:
    done = threading.Event()
    answered: list[Any] = []

    def keep_busy() -> None:
        while not done.is_set():
            answered.extend(naps(client, 12, 150.0))

    load = threading.Thread(target=keep_busy)
    load.start()
    try:
        wait_until(
            "two replicas", lambda: len([r for r in stack.replicas(NAME) if r["state"] == "ready"]) == 2
        )
        # Between two waves there may be no demand, and while the machine has no time for a heartbeat it is
        # not known.
        why: dict[str, Any] = {}
        wait_until("it says why", lambda: why.update(stack.cli("why", "napper")) or explained(why))
        # The second replica may be ready before the first wave is over.
        wait_until("two waves", lambda: len(answered) >= 24)
    finally:
        done.set()
        load.join()
    assert why["desired"] == 2
    assert why["rule"] in {"maximum", "panic", "demand", "utilization"}
    assert max(need["replicas"] for need in why["needs"]) >= 2
    assert why["signals"]["demand"] > 0
    assert any("requests and jobs" in decision["reason"] for decision in why["decisions"])

    checked: dict[str, Any] = {}

    def many_are_checked() -> bool:
        checked.update(stack.cli("replay", "napper", "--verify", "--for", "1h"))
        return bool(checked["rounds"] > 20)

    wait_until("more than 20 rounds", many_are_checked)
    assert checked["decisions"] == checked["reproduced"] >= 2
    out = tmp_path / "napper.png"
    replayed: dict[str, Any] = {}

    def all_are_recorded() -> bool:
        replayed.update(
            stack.cli(
                *("replay", "napper", "--recorded", "--for", "10m", "--with", "max_replicas=1", "--keda"),
                *("--picture", str(out)),
            )
        )
        return bool(replayed["requests"] >= sum(sent))

    wait_until("all requests are recorded", all_are_recorded)
    assert [result["name"] for result in replayed["results"]] == ["live", "max_replicas=1", "keda"]
    assert replayed["requests"] == sum(sent)
    assert sum(sent) >= len(answered) >= 24
    assert 100 < replayed["service"]["call_ms"] < 1000
    assert out.read_bytes().startswith(b"\x89PNG")


def test_a_policy_takes_effect_and_a_pause_ends_all(stack: Stack, napper: str, client: Client) -> None:
    found = stack.cli("policy", "napper", "--set", "min_replicas=2", "--set", "aggressiveness=latency")
    assert found["effective"]["utilization"] == 0.6
    wait_replicas(stack, NAME, 2)
    stack.cli(
        "policy", "napper", "--set", "min_replicas=1", "--set", "aggressiveness=", "--set", "down_window_s=1"
    )
    wait_replicas(stack, NAME, 1)
    stack.cli("pause", "napper", "--for", "10m")
    wait_replicas(stack, NAME, 0)
    stack.cli("resume", "napper")
    wait_replicas(stack, NAME, 1)
    assert naps(client, 1, 1.0)[0]["slept"][0, 0] == 1.0


def test_a_minimum_above_the_stored_maximum_is_refused(stack: Stack, napper: str) -> None:
    refused = stack.run("policy", "napper", "--set", "min_replicas=5")
    assert refused.returncode != 0
    assert "min_replicas 5 is above max_replicas 2. Set both in one command" in refused.stderr
    assert stack.cli("policy", "napper")["given"]["max_replicas"] == 2


def test_a_model_beyond_its_memory_is_ended_and_its_worker_says_so(stack: Stack, client: Client) -> None:
    """As a process of this machine; containers are held to it by their engine."""
    folder = REPO / "benchmarks" / "models" / "deaths"
    options = ("--signature", str(folder / "signature.json"), "--resource", "memory_mb=512")
    stack.deploy(folder / "model.py", "hungry", *options)
    (replica,) = stack.replicas("hungry-v1")
    assert replica["memory_limit"].startswith("512 MiB, ")
    with pytest.raises(TidegateError):
        client.infer("hungry", {"x": np.full((1, 1), 3000.0, np.float32)})
    wait_until("it serves again", lambda: stack.replicas("hungry-v1")[0]["state"] == "ready")
    answer = client.infer("hungry", {"x": np.full((1, 1), 2.0, np.float32)})
    assert answer["y"][0, 0] == 4.0
    wait_until("it says why", lambda: stack.replicas("hungry-v1")[0].get("death"))
    (same,) = stack.replicas("hungry-v1")
    assert same["pid"] == replica["pid"], "only the model was ended"
    assert "out of memory" in same["death"]["words"]
    stack.cli("delete", "hungry", "--yes")


def test_a_cordoned_host_takes_nothing(stack: Stack, napper: str) -> None:
    (host,) = stack.cli("cordon")["items"]
    stack.cli("cordon", host["host"])
    try:
        stack.cli("scale", "napper", "2")
        wait_until("it is told", lambda: any("cordoned" in h for h in stack.cli("why", "napper")["holds"]))
        assert len(stack.replicas(NAME)) == 1
    finally:
        stack.cli("cordon", host["host"], "--off")
    wait_replicas(stack, NAME, 2)
    stack.cli("scale", "napper", "--auto")
    wait_replicas(stack, NAME, 1)


def test_a_model_server_that_is_stopped_is_started_again(stack: Stack, napper: str, client: Client) -> None:
    wait_replicas(stack, NAME, 1)
    worker = stack.worker(NAME)
    triton_of(worker.pid).suspend()
    answer = naps(client, 1, 5.0)[0]
    assert answer["slept"][0, 0] == 5.0, "another model server did it"
    assert worker.is_running()
    words = "a signal (SIGSTOP) had stopped the process"
    wait_until("told", lambda: any(words in e["message"] for e in stack.cli("why", "napper")["ended"]))
    wait_until("ready", lambda: [r["state"] for r in stack.replicas(NAME)] == ["ready"])


def test_a_worker_whose_triton_dies_while_it_drains_takes_nothing_more(
    stack: Stack, napper: str, client: Client
) -> None:
    """It finishes what it holds with another one. Where it took on more it would never have finished."""
    stack.cli("scale", "napper", "1")
    wait_replicas(stack, NAME, 1)
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            naps(client, 1, 200.0)

    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(ask) for _ in range(6)]
        try:
            wait_until("work in hand", lambda: any(r["inflight"] > 1 for r in stack.replicas(NAME)))
            (draining,) = stack.replicas(NAME)
            worker, triton = psutil.Process(draining["pid"]), triton_of(draining["pid"])
            worker.terminate()
            triton.kill()
            worker.wait(PATIENCE_S)
        finally:
            done.set()
        for each in asked:
            each.result(60)
    wait_replicas(stack, NAME, 1)
    stack.cli("scale", "napper", "--auto")


def test_an_autoscaler_killed_amid_a_launch_and_a_drain_leaves_nothing_behind(
    stack: Stack, napper: str, client: Client
) -> None:
    asked = stack.cli("scale", "napper", "3")["answer"]
    assert (asked["runs"], asked["bounded_by"]) == (2, "maximum")
    assert stack.cli("scale", "napper", "3", "--force")["answer"]["runs"] == 3
    wait_until("a launch", lambda: len(stack.replicas(NAME)) > 1)
    stack.child("autoscaler").kill()
    wait_until("it is back", lambda: stack.run("status").returncode == 0)
    wait_replicas(stack, NAME, 3)
    pids = {r["pid"] for r in stack.replicas(NAME)}
    assert len(pids) == 3

    slow = threading.Thread(target=naps, args=(client, 6, 3000.0))
    slow.start()
    wait_until("work in hand", lambda: sum(r["inflight"] for r in stack.replicas(NAME)) >= 3)
    stack.cli("scale", "napper", "1")
    wait_until("a drain", lambda: any(r["state"] == "draining" for r in stack.replicas(NAME)))
    stack.child("autoscaler").kill()
    slow.join(60)
    assert not slow.is_alive(), "every request was answered"
    wait_until("it is back", lambda: stack.run("status").returncode == 0)
    wait_replicas(stack, NAME, 1)
    # Who lost its parent may have to wait until somebody takes its exit code.
    left = [p for p in psutil.process_iter(["pid", "status"]) if p.info["pid"] in pids and not is_over(p)]
    assert len(left) == 1, "one of the three workers is left"
    named = [p for p in psutil.process_iter(["name", "status"]) if p.info["name"] == "tritonserver"]
    mine = [triton for triton in named if not is_over(triton) and replica_of(triton).startswith(NAME)]
    assert [t.ppid() for t in mine] == [left[0].pid]
    stack.cli("scale", "napper", "--auto")
