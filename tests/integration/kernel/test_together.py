"""Several services in one process: their order, an orderly end, and an end if one does not start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.conftest import PATIENCE_S
from tidegate.stack.ports import free_ports

pytestmark = pytest.mark.integration

PROGRAM = """
import sys
from contextlib import asynccontextmanager
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from tidegate.kernel.service.together import Part, run
from tidegate.kernel.settings.base import Settings


def app(name):
    async def answer(request):
        return PlainTextResponse(name)

    @asynccontextmanager
    async def lifespan(_):
        print(f"{name} starts", flush=True)
        if name == sys.argv[3]:
            raise RuntimeError("it does not start")
        yield
        print(f"{name} stops", flush=True)

    return Starlette(routes=[Route("/", answer)], lifespan=lifespan)


parts = [Part(app(name), Settings(), int(port)) for name, port in zip(("first", "second"), sys.argv[1:3])]
sys.exit(run(parts))
"""


def started(folder: Path, failing: str = "") -> tuple[subprocess.Popen[str], list[int]]:
    ports = free_ports(2)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, ports), failing],
        env={**os.environ, "TIDEGATE_STATE_DIR": str(folder)},
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    return process, ports


def answer(port: int) -> str | None:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=PATIENCE_S) as found:
            return found.read().decode()
    except (urllib.error.URLError, ConnectionError):
        return None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_each_has_its_port_and_they_stop_in_the_opposite_order(tmp_path: Path, number: signal.Signals):
    process, ports = started(tmp_path)
    end = time.monotonic() + PATIENCE_S
    while answer(ports[1]) is None:
        assert time.monotonic() < end, "it does not start"
        time.sleep(0.02)
    assert [answer(port) for port in ports] == ["first", "second"]
    process.send_signal(number)
    told, _ = process.communicate(timeout=PATIENCE_S)
    assert told.split("\n")[:-1] == ["first starts", "second starts", "second stops", "first stops"]
    assert process.returncode == 0


def test_if_one_does_not_start_the_others_stop_too(tmp_path: Path):
    process, _ = started(tmp_path, failing="second")
    told, _ = process.communicate(timeout=PATIENCE_S)
    assert told.split("\n")[:-1] == ["first starts", "second starts", "first stops"]
    assert process.returncode == 3
