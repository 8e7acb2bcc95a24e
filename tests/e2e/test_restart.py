"""`tidegate restart`: the services start again with other settings, and callers notice nothing."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc

from tests.conftest import PATIENCE_S
from tests.e2e.conftest import Stack, running_stack
from tests.e2e.test_rollover import IDENTITY

# A module of its own stacks: each test may wait for commands on a busy machine.
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

# Between two calls of a caller. Without it, the callers leave no CPU time to the tests beside this one.
PAUSE_S = 0.02
SERVICES = ["registry", "router", "autoscaler", "gateway"]
BODY = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 16], "data": [1.0] * 16}]}


@pytest.fixture(scope="module", params=[1, 2], ids=["one gateway process", "two gateway processes"])
def own(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    state = tmp_path_factory.mktemp("restart") / "state"
    with running_stack(state, gateway_workers=request.param, http_body_grace_s=5 * PATIENCE_S) as found:
        found.deploy(
            Path(IDENTITY) / "model.py", "identity", "--signature", f"{IDENTITY}/signature.json", "--min", "1"
        )
        yield found


class Callers:
    """Threads that call the model all the time. ``errors``: what went wrong. Nothing is retried."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self.errors: list[str] = []
        self.counts = {"kept connection": 0, "new connection": 0, "grpc": 0}
        self.stop = threading.Event()

    def keeping(self) -> None:
        with httpx.Client(base_url=self._stack.settings.gateway_url, timeout=PATIENCE_S) as http:
            while not self.stop.is_set():
                self._note("kept connection", lambda: self._post(http))

    def connecting(self) -> None:
        while not self.stop.is_set():
            with httpx.Client(base_url=self._stack.settings.gateway_url, timeout=PATIENCE_S) as http:
                self._note("new connection", partial(self._post, http))

    def grpc(self) -> None:
        with triton_grpc.InferenceServerClient(self._stack.settings.gateway_grpc_target) as client:
            x = triton_grpc.InferInput("x", [1, 16], "FP32")
            x.set_data_from_numpy(np.ones((1, 16), np.float32))
            while not self.stop.is_set():
                self._note("grpc", lambda: client.infer("identity", [x]))

    @staticmethod
    def _post(http: httpx.Client) -> None:
        assert http.post("/v2/models/identity/infer", json=BODY).status_code == 200

    def _note(self, kind: str, call: Callable[[], object]) -> None:
        try:
            call()
            self.counts[kind] += 1
        except Exception as error:  # any error is one that a caller has noticed
            self.errors.append(f"{kind}: {error!r}")
        time.sleep(PAUSE_S)


@contextmanager
def calling(stack: Stack) -> Iterator[Callers]:
    callers = Callers(stack)
    threads = [
        threading.Thread(target=flow)
        for flow in (callers.keeping, callers.connecting, callers.grpc)
        for _ in range(4)
    ]
    for each in threads:
        each.start()
    try:
        yield callers
    finally:
        callers.stop.set()
        for each in threads:
            each.join()


def setting(stack: Stack, name: str) -> str:
    found = stack.cli("settings")
    (value,) = {each["value"] for each in found["settings"] if each["name"] == name}
    return str(value)


def test_no_call_fails_while_the_services_restart(own: Stack, figure):
    before = {name: own.child(name).pid for name in SERVICES}
    told = own.run("settings", "set", "ACCESS_LOG_SAMPLE=0.5")
    assert "tidegate restart gateway" in told.stdout
    with calling(own) as callers:
        while min(callers.counts.values()) < 20:
            time.sleep(0.05)
        done = own.cli("restart", timeout_s=4 * PATIENCE_S)
        assert done["restarted"] == SERVICES
        after = dict(callers.counts)
        end = time.monotonic() + PATIENCE_S
        while any(count < after[kind] + 20 for kind, count in callers.counts.items()):
            assert time.monotonic() < end, callers.errors[:3]
            time.sleep(0.05)
    assert not callers.errors, callers.errors[:5]
    now = {name: own.child(name).pid for name in SERVICES}
    assert not set(before.values()) & set(now.values()), "each is a new process"
    assert all(each["restarts"] == 1 for each in children(own) if each["name"] in SERVICES)
    figure(
        f"restart of {len(SERVICES)} services in {done['seconds']} s: "
        f"{sum(callers.counts.values())} calls, 0 failed"
    )


def children(stack: Stack) -> list[dict[str, object]]:
    record = json.loads((stack.settings.state_path / "run" / "stack.json").read_text())
    return list(record["children"])


def test_an_idle_connection_and_a_call_in_flight_end_well(own: Stack):
    """The old gateway answers what comes on its connections, and says that they end."""
    with httpx.Client(base_url=own.settings.gateway_url, timeout=PATIENCE_S) as http:
        assert http.get("/v2/health/live").status_code == 200
        with socket.create_connection((own.settings.host, own.settings.gateway_port)) as raw:
            body = json.dumps(BODY).encode()
            head = "POST /v2/models/identity/infer HTTP/1.1\r\nHost: localhost\r\n"
            raw.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:-1])
            old = own.child("gateway")
            assert own.cli("restart", "gateway", timeout_s=4 * PATIENCE_S)["restarted"] == ["gateway"]
            assert own.child("gateway").pid != old.pid
            raw.sendall(body[-1:])
            with raw.makefile("rb") as lines:
                assert lines.readline() == b"HTTP/1.1 200 OK\r\n"
                assert b"connection: close" in list(iter(lines.readline, b"\r\n"))[-1]
        answer = http.post("/v2/models/identity/infer", json=BODY)
        assert answer.status_code == 200
    old.wait(PATIENCE_S)


def test_a_gateway_that_cannot_start_leaves_the_present_one(own: Stack):
    gateway = own.child("gateway").pid
    file = own.settings.state_path / "tidegate.env"
    text = file.read_text()
    file.write_text(text + "TIDEGATE_TLS_CERT=/missing.pem\nTIDEGATE_TLS_KEY=/missing.key\n")
    try:
        failed = own.run("restart", "gateway", timeout_s=4 * PATIENCE_S)
    finally:
        file.write_text(text)
    assert failed.returncode != 0
    assert "the old process still serves" in failed.stderr
    assert own.child("gateway").pid == gateway
    with httpx.Client(base_url=own.settings.gateway_url, timeout=PATIENCE_S) as http:
        assert http.post("/v2/models/identity/infer", json=BODY).status_code == 200


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "TIDEGATE_REGISTRY_PORT=1",
            "registry would listen elsewhere (TIDEGATE_REGISTRY_PORT or TIDEGATE_HOST changed)",
        ),
        ("TIDEGATE_GATEWAY_WORKERS=3", "the number of gateway processes would change from"),
    ],
)
def test_what_needs_a_stop_of_the_whole_stack_is_refused(own: Stack, line: str, words: str):
    """These settings come from the command's environment here, which has precedence over the file."""
    name, _, value = line.partition("=")
    before = {each: own.child(each).pid for each in SERVICES}
    refused = own.run("restart", env=own.env | {name: value})
    assert refused.returncode != 0
    assert words in refused.stderr
    assert "tidegate down" in refused.stderr
    assert {each: own.child(each).pid for each in SERVICES} == before


def test_a_wrong_variable_is_refused_before_anything_stops(own: Stack):
    before = own.child("registry").pid
    refused = own.run("restart", env=own.env | {"TIDEGATE_MAX_ARTIFACT_BYTES": "8GB"})
    assert refused.returncode != 0
    assert "A variable of the environment is wrong: TIDEGATE_MAX_ARTIFACT_BYTES" in refused.stderr
    assert own.child("registry").pid == before


def test_an_unknown_service_is_refused(own: Stack):
    refused = own.run("restart", "gatway")
    assert refused.returncode != 0
    assert "no service gatway. It has registry, router, autoscaler, gateway" in refused.stderr
