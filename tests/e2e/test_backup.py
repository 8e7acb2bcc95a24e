"""A stack under load is backed up, restored elsewhere, and started there by the commands of its unit."""

from __future__ import annotations

import shlex
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from tests.conftest import PATIENCE_S
from tests.e2e.conftest import PORTS, REPO, Digits, Stack, processes_of
from tests.e2e.guard import Guard
from tidegate import Client
from tidegate.kernel.settings.base import Settings
from tidegate.stack.ports import free_ports

pytestmark = pytest.mark.e2e

SLEEP_MS = 10.0
WAITING = 8


@pytest.fixture
def sleeper(stack: Stack, deploy_python: Callable[..., str]) -> str:
    """A model that is paused, so that its jobs wait for as long as the test likes."""
    name = deploy_python("sleep", "kept-sleeper", "--max-batch", "1")
    stack.cli("pause", name)
    end = time.monotonic() + PATIENCE_S
    while stack.replicas(f"{name}-v1"):
        assert time.monotonic() < end, "its replica does not go"
        time.sleep(0.1)
    return name


@contextmanager
def load(client: Client, digits: Digits) -> Iterator[list[int]]:
    """Infer and submit jobs during the block; the number of answers, and none is an error."""
    stop, problems, seen = threading.Event(), [], []

    def flow() -> None:
        while not stop.is_set():
            try:
                seen.append(int(client.infer("digits", {"image": digits.images[:1]})["label"].ravel()[0]))
                client.submit("digits", {"image": digits.images[:1]})
            except Exception as error:  # any of them is a disturbance
                problems.append(repr(error))

    thread = threading.Thread(target=flow)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()
    assert not problems, problems[:3]


def elsewhere(stack: Stack, state: Path) -> Stack:
    """The same for another state folder, on other ports; nothing is started."""
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    env = stack.env | {f"TIDEGATE_{name}": str(port) for name, port in ports.items()}
    env["TIDEGATE_STATE_DIR"] = str(state)
    fields: dict[str, Any] = {name.lower(): port for name, port in ports.items()}
    return Stack(Settings(state_dir=state, runtime_dir=stack.settings.runtime_path, **fields), env)


class Unit:
    """The unit of a stack, run by hand as systemd would run it."""

    def __init__(self, stack: Stack, folder: Path) -> None:
        text = stack.run("service", "install", "--system", "--print").stdout
        self._lines = [line.partition("=") for line in text.splitlines() if "=" in line and line[0] != "#"]
        self._folder = folder
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(folder / "notify"))
        self._socket.settimeout(PATIENCE_S)
        self.env: dict[str, str] = {name: stack.env[name] for name in ("PATH", "HOME") if name in stack.env}
        for each in self._values("Environment"):
            name, _, value = shlex.split(each)[0].partition("=")
            self.env[name] = value
        self.env |= {"NO_COLOR": "1", "NOTIFY_SOCKET": str(folder / "notify")}

    def _values(self, key: str) -> list[str]:
        return [value for name, _, value in self._lines if name == key]

    def start(self) -> subprocess.Popen[bytes]:
        """ExecStart, without new privileges, as the unit says; returns when the stack is ready."""
        assert self._values("NoNewPrivileges") == ["yes"]
        limit = ["setpriv", "--no-new-privs"] if shutil.which("setpriv") else []
        command = [*limit, *shlex.split(self._values("ExecStart")[0])]
        with (self._folder / "journal").open("wb") as journal:
            main = subprocess.Popen(command, env=self.env, cwd=REPO, stdout=journal, stderr=journal)
        self.hear("READY=1")
        return main

    def stop(self) -> None:
        """ExecStop."""
        subprocess.run(
            shlex.split(self._values("ExecStop")[0]), env=self.env, cwd=REPO, check=True, capture_output=True
        )

    def hear(self, wanted: str) -> None:
        """Wait for what the main process tells its service manager."""
        while wanted not in self._socket.recv(4096).decode().splitlines():
            pass


def test_restored_elsewhere(
    stack: Stack, served: str, digits: Digits, client: Client, sleeper: str, tmp_path: Path
):
    key = stack.cli("keys", "create", "kept", "--scope", "publish")["key"]
    asked = np.array([[SLEEP_MS]], np.float32)
    done = client.submit("digits", {"image": digits.images[:3]})
    done.wait(PATIENCE_S)
    open_ = [client.submit(sleeper, {"ms": asked}, idempotency_key=f"kept-{n}") for n in range(WAITING)]
    with load(client, digits) as seen:
        told = stack.cli("backup", str(tmp_path / "b.tgz"))
        before = len(seen)
        end = time.monotonic() + PATIENCE_S
        while len(seen) == before and time.monotonic() < end:
            time.sleep(0.01)
    assert told["left_out"] == {}
    assert len(seen) > before, "the stack goes on"
    assert {job.status() for job in open_} == {"queued"}
    refused = stack.run("restore", str(tmp_path / "b.tgz"))
    assert refused.returncode == 1
    assert "runs: type `tidegate down`" in refused.stderr

    other = elsewhere(stack, tmp_path / "other" / "state")
    other.cli("restore", str(tmp_path / "b.tgz"), "--into", str(other.settings.state_path))
    unit = Unit(other, tmp_path)
    guard = Guard([*shlex.split(unit._values("ExecStop")[0])], unit.env, REPO)
    main = unit.start()
    try:
        assert psutil.Process(main.pid).cmdline()[-1] == "tidegate.stack", (
            "the main process is the supervisor"
        )
        _the_same_is_there(other, digits, key, done.id, [job.id for job in open_], sleeper)
    finally:
        unit.stop()
        guard.dismiss()
    unit.hear("STOPPING=1")
    assert main.wait(PATIENCE_S) == 0, "so that `Restart=on-failure` leaves it alone"
    assert processes_of(other.settings.state_path) == []


def _the_same_is_there(
    stack: Stack, digits: Digits, key: str, done: str, open_: list[str], sleeper: str
) -> None:
    with Client(stack.settings.gateway_url, timeout_s=2 * PATIENCE_S) as client:
        answer = client.infer("digits", {"image": digits.images[:64]})
        assert np.allclose(answer["probabilities"], digits.probabilities[:64], atol=1e-5)
        kept = client.job(done).result(PATIENCE_S)["probabilities"]
        assert np.allclose(kept, digits.probabilities[:3], atol=1e-5)
        again = client.submit(sleeper, {"ms": np.array([[SLEEP_MS]], np.float32)}, idempotency_key="kept-0")
        assert again.id == open_[0], "the same key is the same job"
        assert client.job(open_[-1]).status() == "queued"
        stack.cli("resume", sleeper)
        for job in open_:
            assert client.job(job).result(PATIENCE_S)["slept"].ravel()[0] == SLEEP_MS
    headers = {"Authorization": f"Bearer {key}"}
    url = f"{stack.settings.gateway_url}/api/registry/v1/models/digits/versions"
    assert (
        httpx.get(url, headers=headers, trust_env=False).raise_for_status().json()["items"][0]["number"] == 1
    )
    # The ledger's last look may be older than the end of the jobs.
    end = time.monotonic() + PATIENCE_S
    while (told := stack.run("ledger")).returncode:
        assert time.monotonic() < end, told.stdout
