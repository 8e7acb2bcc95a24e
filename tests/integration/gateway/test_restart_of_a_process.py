"""A gateway process that takes over sockets during a restart, and one that gives them up."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.gateway import processes
from services.gateway.processes import Members
from tests.integration.gateway.process import wait_listening
from tidegate.kernel.service import handover
from tidegate.stack.ports import free_ports

pytestmark = pytest.mark.integration

Pipe = tuple[int, int]


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    """The pipe through which a new process reports that it is ready."""
    reading, writing = os.pipe()
    yield reading, writing
    for each in (reading, writing):
        try:
            os.close(each)
        except OSError:
            pass  # the test has closed it


def listens(sock: socket.socket) -> bool:
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def test_a_restart_is_undecided_until_the_supervisor_closes_the_pipe(pipe: Pipe, monkeypatch):
    reading, writing = pipe
    assert not handover.undecided()
    monkeypatch.setenv(handover.READY, str(writing))
    assert handover.undecided()
    handover.report_ready()
    assert os.read(reading, 9) == b"."
    os.close(reading)
    assert not handover.undecided()
    assert handover.READY not in os.environ
    handover.report_ready()


def test_a_new_gateway_does_not_listen_before_it_is_ready(
    tmp_path: Path, valkey_url: str, jobs_url: str, pipe: Pipe
):
    """The old gateway serves meanwhile. If the new one also accepted, its callers would wait in vain."""
    reading, writing = pipe
    nobody, *ports = free_ports(3)
    http, grpc = socket.socket(), socket.socket()
    for sock, port in zip((http, grpc), ports, strict=True):
        sock.bind(("127.0.0.1", port))
    env = {
        "TIDEGATE_STATE_DIR": str(tmp_path),
        "TIDEGATE_SERVICE_TOKEN": "token",
        "TIDEGATE_AMQP_URL": f"amqp://127.0.0.1:{nobody}/",
        "TIDEGATE_REDIS_URL": valkey_url,
        "TIDEGATE_JOBS_URL": jobs_url,
        handover.SOCKETS: json.dumps({"http": [http.fileno()], "grpc": [grpc.fileno()]}),
        handover.READY: str(writing),
    }
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "services.gateway"],
            env={**os.environ, **env},
            pass_fds=(http.fileno(), grpc.fileno(), writing),
            stdout=log,
            stderr=log,
        )
    try:
        end = time.monotonic() + 5
        while time.monotonic() < end:
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert not listens(http)
            assert not listens(grpc)
            time.sleep(0.1)
        # The supervisor has ended, so nobody waits for the report. This gateway is the only one.
        os.close(reading)
        wait_listening(process, ports[0], tmp_path / "log")
        assert listens(grpc)
    finally:
        process.kill()
        process.wait()
        http.close()
        grpc.close()


def test_a_restart_that_fails_leaves_the_sockets_of_the_old_gateway(tmp_path: Path, pipe: Pipe, monkeypatch):
    """Also if a new process dies late: the old gateway listens at the same sockets."""
    monkeypatch.setattr(processes, "HEALTHY_AFTER_S", 0.0)
    monkeypatch.setattr(
        processes, "_COMMAND", [sys.executable, "-c", "import time; time.sleep(0.5); exit(3)"]
    )
    handlers = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    }
    with socket.create_server(("127.0.0.1", 0)) as old:
        monkeypatch.setenv(handover.SOCKETS, json.dumps({"http": [os.dup(old.fileno())]}))
        monkeypatch.setenv(handover.READY, str(pipe[1]))
        try:
            assert Members(1, tmp_path / "metrics").run() == 1
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        assert listens(old)
