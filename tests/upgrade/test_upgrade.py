"""A state folder that an earlier revision has used is served by this one: `make test-upgrade`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.conftest import PATIENCE_S
from tests.e2e.conftest import PORTS, Stack, processes_of
from tests.upgrade import old_state
from tidegate import Client
from tidegate.kernel.settings.base import Settings
from tidegate.stack.ports import free_ports

pytestmark = pytest.mark.e2e

FROM = os.environ.get("TIDEGATE_UPGRADE_FROM", "026450f")
ONE = np.ones((1, 16), np.float32)


@pytest.fixture(scope="module")
def upgraded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stack, dict[str, Any]]]:
    """This revision on the state folder of the earlier one, and what is to be there."""
    state = tmp_path_factory.mktemp("upgrade") / "state"
    state.mkdir()
    runtime = Settings().runtime_path
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    env = old_state.environment(state, ports, runtime)
    try:
        old_state.build(FROM, state, env)
    except old_state.NoHistory as missing:
        pytest.skip(str(missing))
    fields: dict[str, Any] = {name.lower(): port for name, port in ports.items()}
    stack = Stack(Settings(state_dir=state, runtime_dir=runtime, **fields), env)
    try:
        stack.cli("backup", str(state.parent / "before.tgz"))
        stack.cli("up", timeout_s=300)
        yield stack, json.loads((state / old_state.EXPECTED).read_text())
    finally:
        down = stack.run("down")
    assert down.returncode == 0, down.stderr
    assert processes_of(state) == []


Upgraded = tuple[Stack, dict[str, Any]]


def test_models_answer_as_before(upgraded: Upgraded):
    stack, expected = upgraded
    assert {each["name"]: each["versions"] for each in stack.cli("models")["items"]} == expected["models"]
    with Client(stack.settings.gateway_url, timeout_s=PATIENCE_S) as client:
        client.wait_ready(old_state.NAME, PATIENCE_S)
        assert client.infer(old_state.NAME, {"x": ONE})["y"][0, 0] == 3.0
        assert client.infer(old_state.NAME, {"x": ONE}, version="1")["y"][0, 0] == 2.0


def test_jobs_are_kept_and_those_that_waited_run(upgraded: Upgraded):
    stack, expected = upgraded
    with Client(stack.settings.gateway_url, timeout_s=PATIENCE_S) as client:
        assert client.job(expected["done"]).result(PATIENCE_S)["y"][0, 0] == 3.0
        for job in expected["waiting"]:
            assert client.job(job).result(PATIENCE_S)["slept"].ravel()[0] == old_state.SLEEP_MS
    # The ledger's last look may be older than the end of the jobs.
    end = time.monotonic() + PATIENCE_S
    while (told := stack.run("ledger")).returncode:
        assert time.monotonic() < end, told.stdout


def test_keys_open_what_they_opened(upgraded: Upgraded):
    stack, expected = upgraded
    url = f"{stack.settings.gateway_url}/api/registry/v1/models"
    headers = {"Authorization": f"Bearer {expected['key']}"}
    assert httpx.get(url, headers=headers, trust_env=False).raise_for_status().json()["items"]


def test_the_next_version_rolls_out_and_back(upgraded: Upgraded, tmp_path: Path):
    stack, _ = upgraded
    (tmp_path / "model.py").write_text(old_state.IDENTITY.replace("FACTOR", "4"))
    signature = "examples/python-model/identity/signature.json"
    stack.deploy(tmp_path / "model.py", old_state.NAME, "--signature", signature)
    with Client(stack.settings.gateway_url, timeout_s=PATIENCE_S) as client:
        assert client.infer(old_state.NAME, {"x": ONE})["y"][0, 0] == 4.0
        assert stack.cli("rollback", old_state.NAME)["deployment"]["version"] == 2
        assert client.infer(old_state.NAME, {"x": ONE})["y"][0, 0] == 3.0
