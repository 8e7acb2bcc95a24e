"""Two registries at once, as processes, on one PostgreSQL and one S3 store: no write is lost or repeated."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.gateway.process import wait_ready
from tests.integration.kernel.s3 import S3
from tests.integration.registry import postgres as postgresql
from tests.integration.registry.conftest import NO_BROKER, TEMPLATE, TOKEN, _admin
from tests.integration.registry.onnx_files import onnx_bytes
from tidegate.kernel.protocol import replica_token
from tidegate.stack.ports import free_ports

VERSIONS = 8
CONTENT = os.urandom(5 * 2**20)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Registry:
    """A registry as a process."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        (port,) = free_ports(1)
        log = folder / f"{port}.log"
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "services.registry"],
                env=environment | {"TIDEGATE_REGISTRY_PORT": str(port)},
                stdout=out,
                stderr=out,
            )
        try:
            wait_ready(self.process, port, log)
        except BaseException:
            self.process.kill()
            raise
        self.http = httpx.Client(
            base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60
        )

    def call(self, method: str, path: str, status: int = 200, **arguments: Any) -> Any:
        answer = self.http.request(method, path, **arguments)
        assert answer.status_code == status, answer.text
        return answer.json() if answer.content else None

    def register(self, number: int) -> int:
        sha256 = self.call("PUT", "/v1/artifacts", 201, content=onnx_bytes(number))["sha256"]
        body = {"artifact": sha256, "filename": "model.onnx"}
        return int(self.call("POST", "/v1/models/digits/versions", 201, json=body)["number"])

    def stop(self) -> None:
        self.http.close()
        self.process.kill()
        self.process.wait()


@pytest.fixture
async def two(postgres: postgresql.Server, s3_at: Callable[[str], S3], tmp_path: Path) -> Any:
    """Two registries that share database and store."""
    name = f"two{os.urandom(8).hex()}"
    store = s3_at("rclone").url  # also sets the credentials in the environment
    kept = {key: value for key, value in os.environ.items() if not key.startswith("TIDEGATE_")}
    async with _admin(postgres) as admin:
        await admin.execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
        environment = kept | {
            "TIDEGATE_STATE_DIR": str(tmp_path),
            "TIDEGATE_SERVICE_TOKEN": TOKEN,
            "TIDEGATE_DATABASE_URL": postgres.url(name),
            "TIDEGATE_ARTIFACT_URL": store,
            "TIDEGATE_AMQP_URL": NO_BROKER,
            "TIDEGATE_VERIFICATION": "off",
        }
        with ExitStack() as stack:
            made = [Registry(environment, tmp_path) for _ in range(2)]
            for each in made:
                stack.callback(each.stop)
            yield made
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


def test_two_registries_share_one_database_and_one_store(two: list[Registry]) -> None:
    first, second = two
    with ThreadPoolExecutor(VERSIONS) as threads:
        numbers = threads.map(lambda number: two[number % 2].register(number), range(VERSIONS))
        assert sorted(numbers) == list(range(1, VERSIONS + 1)), "each number is used once"

        def deploy(number: int) -> int:
            body = {"model": "digits", "version": number, "endpoint": "digits"}
            return int(two[number % 2].call("POST", "/v1/deploy", json=body)["endpoint"]["revision"])

        revisions = sorted(threads.map(deploy, range(1, VERSIONS + 1)))
    state = first.call("GET", "/v1/desired-state")
    assert state == second.call("GET", "/v1/desired-state")
    assert len(set(revisions)) == VERSIONS, "each deploy is a revision of its own"
    assert state["revision"] == revisions[-1]
    assert len(state["deployments"]) == VERSIONS

    # An upload that began at one registry ends at the other one.
    upload = first.call("POST", "/v1/uploads", 201, json={"sha256": DIGEST, "size": len(CONTENT)})
    path, half = f"/v1/uploads/{upload['id']}", len(CONTENT) // 2
    first.call("PATCH", path, content=CONTENT[:half], headers={"Upload-Offset": "0"})
    running = {"artifacts": {"digits-v1-a": DIGEST}}
    first.call("PUT", "/v1/replicas", 204, json=running)
    first.stop()
    assert second.call("GET", path)["offset"] == half
    second.call("PATCH", path, content=CONTENT[half:], headers={"Upload-Offset": str(half)})
    assert second.call("GET", path)["state"] == "stored"
    assert second.http.get(f"/v1/artifacts/{DIGEST}").content == CONTENT

    # The autoscaler reported to the other registry which replicas run.
    headers = {"Authorization": f"Bearer {replica_token.issue(TOKEN, 'digits-v1-a')}"}
    second.call("HEAD", f"/v1/artifacts/{DIGEST}", headers=headers)
