"""TLS at the gateway: HTTP and gRPC, a renewed certificate, large uploads, and refusals."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import orjson
import pytest
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc as stubs

from tests.conftest import PATIENCE_S
from tests.integration.gateway.certificates import Authority
from tidegate.cli.api import Control
from tidegate.client import AsyncClient
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Request
from tidegate.kernel.settings.base import Settings
from tidegate.stack import probes
from tidegate.stack.child import Probe
from tidegate.stack.ports import free_ports
from tidegate.tune.measurement import GatewayAddress, measure

pytestmark = pytest.mark.integration

BODY = orjson.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]})
BIG = 50 * 2**20
SIGNATURE = {
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1]}],
    "max_batch_size": 8,
}


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def folder(authority) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as found:
        authority.sign().write(Path(found) / "cert.pem", Path(found) / "key.pem")
        (Path(found) / "ca.pem").write_bytes(authority.pem)
        yield Path(found)


@pytest.fixture(scope="module")
def gateway_env(folder) -> dict[str, str]:
    return {
        "TIDEGATE_TLS_CERT": str(folder / "cert.pem"),
        "TIDEGATE_TLS_KEY": str(folder / "key.pem"),
        "TIDEGATE_BLOB_URL": f"file://{folder / 'blobs'}",
    }


@pytest.fixture(scope="module")
def gateway_route() -> dict[str, Any]:
    return {"signature": SIGNATURE}


@pytest.fixture
def trust(folder) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(folder / "ca.pem"))


@pytest.fixture
def url(gateway) -> str:
    return f"https://127.0.0.1:{gateway.port}"


def serial(port: int, *, version: ssl.TLSVersion | None = None) -> int:
    """Return the serial number of the certificate that a new connection gets."""
    from cryptography import x509

    context = ssl._create_unverified_context()
    if version is not None:
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = version
    with (
        socket.create_connection(("127.0.0.1", port), 10) as plain,
        context.wrap_socket(plain) as connection,
    ):
        shown = connection.getpeercert(binary_form=True)
    assert shown is not None
    return x509.load_der_x509_certificate(shown).serial_number


async def test_inference_over_https(worker, url, trust):
    async with httpx.AsyncClient(base_url=url, verify=trust) as client:
        answer = await client.post("/v2/models/digits/infer", content=BODY)
        assert answer.status_code == 200, answer.text
        assert answer.json()["outputs"][0]["data"] == [1, 2]
        assert (await client.get("/v2/models/digits")).status_code == 200
    async with httpx.AsyncClient(base_url=url) as stranger:
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            await stranger.get("/v2")


@pytest.mark.parametrize("setting", ["TIDEGATE_TLS_CA", "TIDEGATE_TLS_CERT"])
async def test_the_python_client_trusts_a_private_authority(worker, url, folder, monkeypatch, setting):
    """By the authority's certificate, or by the gateway's own on the same machine."""
    monkeypatch.setenv(setting, str(folder / ("ca.pem" if setting.endswith("CA") else "cert.pem")))
    async with AsyncClient(url) as client:
        found = await client.infer("digits", {"x": np.array([[3, 4]], np.float32)})
    assert found["y"].tolist() == [[3, 4]]


async def test_an_upload_of_50_mb(worker, url, trust, folder):
    """It is received in place, by a protocol of its own, on the TLS transport; the connection goes on."""

    def digest(request: Request) -> bytes:
        (blob,) = (path for path in (folder / "blobs").rglob("*") if path.is_file())
        found = hashlib.sha256(blob.read_bytes()).hexdigest()
        return envelope.failure_frame(request.id, request.attempt, "model_failed", found)

    data = os.urandom(BIG)
    tensor = {
        "name": "x",
        "datatype": "FP32",
        "shape": [1, BIG // 4],
        "parameters": {"binary_data_size": BIG},
    }
    head = orjson.dumps({"inputs": [tensor]})
    headers = {"Inference-Header-Content-Length": str(len(head))}
    worker.answer = digest
    async with httpx.AsyncClient(base_url=url, verify=trust, timeout=60) as client:
        for _ in range(2):
            answer = await client.post("/v2/models/digits/infer", content=head + data, headers=headers)
            assert answer.json()["error"] == hashlib.sha256(data).hexdigest()
        assert (await client.get("/v2/models/digits")).status_code == 200


async def test_inference_over_grpc(gateway, worker, folder):
    credentials = grpc.ssl_channel_credentials((folder / "ca.pem").read_bytes())
    async with grpc.aio.secure_channel(f"localhost:{gateway.grpc_port}", credentials) as channel:
        stub = stubs.GRPCInferenceServiceStub(channel)
        asked = pb.ModelInferRequest(model_name="digits")
        asked.inputs.add(name="x", datatype="FP32", shape=[1, 2]).contents.fp32_contents.extend([0.5, -8])
        answer = await stub.ModelInfer(asked)
        assert np.frombuffer(answer.raw_output_contents[0], np.float32).tolist() == [0.5, -8]
    async with grpc.aio.insecure_channel(gateway.grpc) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stubs.GRPCInferenceServiceStub(channel).ServerLive(pb.ServerLiveRequest(), timeout=5)
        assert caught.value.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
async def test_old_tls_versions_and_plain_text_are_refused(gateway, url, trust):
    with pytest.raises((ssl.SSLError, ConnectionError)):
        serial(gateway.port, version=ssl.TLSVersion.TLSv1_1)
    async with httpx.AsyncClient() as client:
        with pytest.raises(httpx.TransportError):
            await client.get(f"http://127.0.0.1:{gateway.port}/health/live")
    async with httpx.AsyncClient(verify=trust) as client:
        assert (await client.get(f"{url}/health/live")).status_code == 200
    assert "Traceback" not in (gateway.state / "log").read_text()


def test_the_command_line_and_its_load(gateway, url, folder, monkeypatch):
    """`tidegate status` and `tidegate tune` on the gateway's machine, by the gateway's own certificate."""
    monkeypatch.setenv("TIDEGATE_TLS_CERT", str(folder / "cert.pem"))
    monkeypatch.setenv("TIDEGATE_TLS_KEY", str(folder / "key.pem"))
    monkeypatch.setenv("TIDEGATE_GATEWAY_PORT", str(gateway.port))
    monkeypatch.setenv("TIDEGATE_SERVICE_TOKEN", "token")
    assert Control(Settings()).gateway.health() == (200, {"status": "ready", "problems": {}})
    address = GatewayAddress.of(url)
    request = f"GET /v2/health/live HTTP/1.1\r\nHost: 127.0.0.1:{gateway.port}\r\n\r\n".encode()
    assert measure(address, request, 2, 0.5).answers > 0


def test_probes_of_the_stack(gateway, url, folder):
    assert probes.problem(Probe("https", gateway.port)) is None
    check = Path(__file__).parents[3] / "deploy" / "healthcheck.py"
    env = {
        "TIDEGATE_TLS_CERT": str(folder / "cert.pem"),
        "TIDEGATE_GATEWAY_PORT": str(gateway.port),
        "PATH": os.environ["PATH"],
    }
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(check), str(gateway.port)], env=env, capture_output=True, check=False
    )
    assert done.returncode == 0, done


async def test_a_renewed_certificate_and_a_connection_that_is_held(
    gateway, worker, authority, folder, url, trust, until
):
    cert, key = folder / "cert.pem", folder / "key.pem"
    first = serial(gateway.port)
    limits = httpx.Limits(keepalive_expiry=600)
    async with httpx.AsyncClient(base_url=url, verify=trust, limits=limits) as held:
        await held.get("/v2/models/digits")
        (connection,) = held._transport._pool.connections  # type: ignore[attr-defined]

        renewed = authority.sign()
        cert.write_bytes(renewed.cert)  # the key is still the old one
        log = gateway.state / "log"
        await until(lambda: "the new certificate is not used" in log.read_text(), "the warning")
        assert (serial(gateway.port), serial(gateway.grpc_port)) == (first, first)
        cert.unlink()
        await until(lambda: "cannot be read" in log.read_text(), "the other warning")
        assert serial(gateway.port) == first

        renewed.write(cert, key)
        await until(lambda: serial(gateway.port) == renewed.serial, "the new certificate")
        assert serial(gateway.grpc_port) == renewed.serial
        answer = await held.post("/v2/models/digits/infer", content=BODY)
        assert answer.status_code == 200
        assert held._transport._pool.connections == [connection], "the same connection"  # type: ignore[attr-defined]
    assert log.read_text().count("the new certificate is not used") == 2


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("cert.pem", ""), "go together"),
        (("cert.pem", "other.pem"), "are not a PEM certificate chain and its key"),
        (("cert.pem", "none.pem"), "none.pem cannot be read"),
    ],
)
def test_a_gateway_needs_both_certificate_and_key(authority, tmp_path, names, words):
    authority.sign().write(tmp_path / "cert.pem", tmp_path / "key.pem")
    (tmp_path / "other.pem").write_bytes(authority.sign().key)
    env = {
        **os.environ,
        "TIDEGATE_STATE_DIR": str(tmp_path),
        "TIDEGATE_SERVICE_TOKEN": "token",
        "TIDEGATE_TLS_CERT": str(tmp_path / names[0]),
        "TIDEGATE_TLS_KEY": str(tmp_path / names[1]) if names[1] else "",
    }
    done = subprocess.run(
        [sys.executable, "-m", "services.gateway"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode != 0
    assert words in done.stderr


def test_an_idle_client_does_not_delay_the_stop(authority, tmp_path, rabbitmq_url, valkey_url):
    """It does not answer the TLS close, for which the server would wait 30 s."""
    port, grpc_port = free_ports(2)
    authority.sign().write(tmp_path / "cert.pem", tmp_path / "key.pem")
    env = {
        "TIDEGATE_STATE_DIR": str(tmp_path),
        "TIDEGATE_SERVICE_TOKEN": "token",
        "TIDEGATE_GATEWAY_PORT": str(port),
        "TIDEGATE_GATEWAY_GRPC_PORT": str(grpc_port),
        "TIDEGATE_AMQP_URL": rabbitmq_url,
        "TIDEGATE_REDIS_URL": valkey_url,
        "TIDEGATE_TLS_CERT": str(tmp_path / "cert.pem"),
        "TIDEGATE_TLS_KEY": str(tmp_path / "key.pem"),
    }
    with (tmp_path / "log").open("wb") as log:
        command = [sys.executable, "-m", "services.gateway"]
        process = subprocess.Popen(command, env={**os.environ, **env}, stdout=log, stderr=log)
    try:
        wait_for_door(port)
        context = ssl.create_default_context(cadata=authority.pem.decode())
        idle = [
            context.wrap_socket(socket.create_connection(("127.0.0.1", at), 10), server_hostname="localhost")
            for at in (port, port, grpc_port)
        ]
        idle[0].sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert idle[0].recv(20).startswith(b"HTTP/1.1 200")
        process.send_signal(signal.SIGTERM)
        # Less than the 30 s of an unanswered TLS close, however busy the machine is.
        assert process.wait(20) == 0
        for connection in idle:
            connection.close()
    finally:
        process.kill()


def wait_for_door(port: int) -> None:
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        if probes.problem(Probe("https", port)) != "not answering yet":
            return
        time.sleep(0.05)
    raise AssertionError("the gateway does not answer")
