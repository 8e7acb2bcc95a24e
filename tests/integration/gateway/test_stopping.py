"""A gateway that stops tells its gRPC clients at once, while HTTP requests still run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from services.gateway.api.grpc import frames
from tests.conftest import PATIENCE_S
from tests.integration.gateway.process import wait_listening
from tidegate.stack.ports import free_ports

pytestmark = pytest.mark.integration


def kinds(door: socket.socket) -> list[int]:
    """Return the kinds of the received frames, up to a GOAWAY or the end."""
    found: list[int] = []
    stream = door.makefile("rb")
    while frames.GOAWAY not in found and (head := stream.read(9)):
        found.append(head[3])
        stream.read(int.from_bytes(head[:3], "big"))
    return found


def test_grpc_clients_learn_of_a_stop_before_http_requests_end(
    tmp_path: Path, rabbitmq_url, valkey_url, jobs_url
):
    port, grpc_port = free_ports(2)
    env = {
        "TIDEGATE_STATE_DIR": str(tmp_path),
        "TIDEGATE_SERVICE_TOKEN": "token",
        "TIDEGATE_GATEWAY_PORT": str(port),
        "TIDEGATE_GATEWAY_GRPC_PORT": str(grpc_port),
        "TIDEGATE_AMQP_URL": rabbitmq_url,
        "TIDEGATE_REDIS_URL": valkey_url,
        "TIDEGATE_JOBS_URL": jobs_url,
        "TIDEGATE_HTTP_BODY_GRACE_S": "600",
    }
    with (tmp_path / "log").open("wb") as log:
        command = [sys.executable, "-m", "services.gateway"]
        process = subprocess.Popen(command, env={**os.environ, **env}, stdout=log, stderr=log)
    try:
        wait_listening(process, port, tmp_path / "log")
        # Half a body: HTTP waits 30 s for the rest. The 100 response shows that the headers were read.
        http = socket.create_connection(("127.0.0.1", port), 20)
        http.sendall(
            b"POST /v2/models/m/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n"
            b"Expect: 100-continue\r\n\r\n"
        )
        assert http.recv(100).startswith(b"HTTP/1.1 100")
        grpc = socket.create_connection(("127.0.0.1", grpc_port), 20)
        grpc.sendall(frames.PREFACE + frames.settings(()))
        process.send_signal(signal.SIGTERM)
        # Less than these 30 s, however busy the machine is: recv raises TimeoutError after 20 s.
        assert frames.GOAWAY in kinds(grpc)
        assert process.poll() is None
        http.close()
        assert process.wait(PATIENCE_S) == 0
        grpc.close()
    finally:
        process.kill()
        process.wait()
