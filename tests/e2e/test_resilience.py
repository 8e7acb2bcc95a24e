"""Parts are killed while requests flow one after the other: every request still gets a right answer."""

from __future__ import annotations

import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import psutil
import pytest

from tests.conftest import Figure
from tests.e2e.conftest import Digits, Stack
from tests.e2e.sockets import break_all, connections_of
from tidegate import Client, ModelFailed

PATIENCE_S = 120.0


class Flow(threading.Thread):
    """Requests one after the other; remembers every answer that was wrong or missing."""

    def __init__(self, stack: Stack, model: str, digits: Digits) -> None:
        super().__init__(daemon=True)
        self._stack, self._model, self._digits = stack, model, digits
        self._ask_to_end = threading.Event()
        self.problems: list[str] = []
        self.answered = 0
        self.longest_s = 0.0

    def run(self) -> None:
        with Client(self._stack.settings.gateway_url, timeout_s=PATIENCE_S) as client:
            while not self._ask_to_end.is_set():
                at = self.answered % len(self._digits.images)
                began = time.monotonic()
                try:
                    answer = client.infer(self._model, {"image": self._digits.images[at : at + 1]})
                    if answer["label"][0] != self._digits.labels[at]:
                        self.problems.append(f"image {at}: {answer['label']}")
                except Exception as error:  # any of them is a finding of this test
                    self.problems.append(f"image {at}: {error!r}")
                self.longest_s = max(self.longest_s, time.monotonic() - began)
                self.answered += 1

    def end(self) -> None:
        self._ask_to_end.set()
        self.join(PATIENCE_S)

    def wait_for(self, more: int) -> None:
        """Return when ``more`` further requests were answered."""
        goal, limit = self.answered + more, time.monotonic() + PATIENCE_S
        while self.answered < goal:
            assert time.monotonic() < limit, f"no further answers; problems: {self.problems}"
            time.sleep(0.01)


@contextmanager
def flowing(stack: Stack, model: str, digits: Digits) -> Iterator[Flow]:
    """Requests flow while the block runs; at its end all of them must have been right."""
    flow = Flow(stack, model, digits)
    flow.start()
    try:
        flow.wait_for(20)
        yield flow
        flow.wait_for(20)
    finally:
        flow.end()
    assert not flow.problems, flow.problems[:5]


def wait_until(what: str, check, limit_s: float = PATIENCE_S) -> float:
    """Return the seconds until ``check()`` is true.

    A command takes 0.3 s of CPU time, so the pause is as long as the check.
    """
    began = asked = time.monotonic()
    while not check():
        now = time.monotonic()
        assert now - began < limit_s, f"not within {limit_s} s: {what}"
        time.sleep(max(0.05, now - asked))
        asked = time.monotonic()
    return time.monotonic() - began


def test_worker_killed(stack: Stack, served: str, digits: Digits, figure: Figure):
    with flowing(stack, served, digits) as flow:
        worker = stack.worker("digits-v1")
        worker.kill()
        replaced = wait_until(
            "a new worker",
            lambda: any(
                r["state"] == "ready" and r["pid"] != worker.pid for r in stack.replicas("digits-v1")
            ),
        )
    figure(f"worker killed: replaced in {replaced:.1f} s, longest request {flow.longest_s:.1f} s")


def test_triton_killed(stack: Stack, served: str, digits: Digits, figure: Figure):
    with flowing(stack, served, digits) as flow:
        worker = stack.worker("digits-v1")
        (triton,) = [p for p in worker.children() if p.name() == "tritonserver"]
        triton.kill()
        replaced = wait_until(
            "a new tritonserver",
            lambda: any(
                p.info["name"] == "tritonserver" and p.pid != triton.pid
                for p in psutil.process_iter(["name", "ppid"])
                if p.info["ppid"] == worker.pid
            ),
        )
        wait_until("ready again", lambda: stack.replicas("digits-v1")[0]["state"] == "ready")
    figure(f"tritonserver killed: replaced in {replaced:.1f} s, longest request {flow.longest_s:.1f} s")
    assert worker.is_running()


def to_triton(each: socket.socket) -> bool:
    return each.family == socket.AF_UNIX and str(each.getpeername()).endswith(("grpc:1", "http"))


def test_connection_to_triton_broken(stack: Stack, served: str, digits: Digits, figure: Figure):
    """While calls are on it; Triton lives on, and so the worker goes on with it."""
    with flowing(stack, served, digits) as other, flowing(stack, served, digits) as flow:
        worker = stack.worker("digits-v1")
        (triton,) = [p for p in worker.children() if p.name() == "tritonserver"]
        for _ in range(10):
            broken = connections_of(worker, to_triton)
            assert broken
            break_all(broken)
            # A request that loses its connection three times fails. So none is in flight in two breaks.
            flow.wait_for(5)
            other.wait_for(5)
    figure(f"connection to Triton broken ten times: longest request {flow.longest_s:.1f} s")
    assert [p for p in worker.children() if p.name() == "tritonserver"] == [triton]


def test_a_request_says_that_its_connection_broke(stack: Stack, deploy_python: Callable[..., str]):
    """Triton was killed earlier, but that is not why this request is given up."""
    deploy_python("sleep", "cut-off", "--min", "1", "--max", "1")
    worker = stack.worker("cut-off-v1")
    (triton,) = [p for p in worker.children() if p.name() == "tritonserver"]
    triton.kill()
    wait_until(
        "a new tritonserver",
        lambda: any(
            p.info["name"] == "tritonserver" and p.pid != triton.pid and p.info["ppid"] == worker.pid
            for p in psutil.process_iter(["name", "ppid"])
        ),
    )
    wait_until("ready again", lambda: stack.replicas("cut-off-v1")[0]["state"] == "ready")
    ms = np.array([[4000.0]], np.float32)
    with Client(stack.settings.gateway_url, timeout_s=PATIENCE_S) as client, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.infer, "cut-off", {"ms": ms})
        while not asked.done():
            time.sleep(1.0)  # so that the worker calls Triton again
            break_all(connections_of(worker, to_triton))
        with pytest.raises(ModelFailed, match="the connection to the model server broke each time"):
            asked.result()
    stack.cli("delete", "cut-off", "--yes")


def test_registry_stopped(stack: Stack, served: str, digits: Digits):
    registry = stack.child("registry")
    with flowing(stack, served, digits) as flow:
        registry.suspend()
        try:
            flow.wait_for(200)
            # A replacement needs no registry either: the artifact is in this host's cache.
            worker = stack.worker("digits-v1")
            worker.kill()
            flow.wait_for(20)
        finally:
            registry.resume()


def test_store_restarted_empty(stack: Stack, served: str, digits: Digits, figure: Figure):
    valkey = stack.child("valkey")
    with flowing(stack, served, digits) as flow:
        valkey.suspend()
        for data in (stack.settings.state_path / "data" / "valkey").iterdir():
            shutil.rmtree(data) if data.is_dir() else data.unlink()
        valkey.send_signal(signal.SIGKILL)
        flow.wait_for(100)
        began = time.monotonic()
        with Client(stack.settings.gateway_url) as client:
            wait_until("the route table", lambda: stack.cli("routes")["endpoints"] and client.models())
            wait_until("presence", lambda: len(stack.replicas("digits-v1")) == 1)
        wait_until("the store has the table", lambda: _table_in_store(stack))
        figure(f"store restarted empty: the route table is back {time.monotonic() - began:.1f} s later")


def _table_in_store(stack: Stack) -> bool:
    import redis

    try:
        with redis.Redis.from_url(stack.server_url("valkey", "router")) as store:
            return store.get("tidegate:routes") is not None
    except redis.ConnectionError:
        return False


def test_broker_killed(stack: Stack, served: str, digits: Digits, figure: Figure):
    with flowing(stack, served, digits) as flow:
        stack.child("rabbitmq").kill()
        flow.wait_for(50)
    figure(f"broker killed: every request answered, the longest took {flow.longest_s:.1f} s")


@pytest.mark.parametrize("service", ["autoscaler", "router"])
def test_control_plane_killed(stack: Stack, served: str, digits: Digits, service: str):
    before = stack.worker("digits-v1").pid
    with flowing(stack, served, digits) as flow:
        old = stack.child(service)
        old.kill()
        flow.wait_for(100)
        wait_until(f"{service} again", lambda: stack.child(service).pid != old.pid)
        wait_until("the stack is well", lambda: stack.run("status").returncode == 0)
    assert stack.worker("digits-v1").pid == before, "the worker was adopted, not doubled"
    assert len(stack.replicas("digits-v1")) == 1


def test_labels_after_all_that(client: Client, served: str, digits: Digits):
    answer = client.infer(served, {"image": digits.images[:64]})
    assert np.array_equal(answer["label"], digits.labels[:64])
