"""A Triton of the tests' own, to be asked what it says itself."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from services.worker.adapters.triton_install import TritonInstall
from tests.conftest import PATIENCE_S
from tidegate.kernel.settings.base import Settings
from tidegate.stack.ports import free_ports


@dataclass(frozen=True)
class Doors:
    """Where a server answers."""

    http: str
    grpc: str


@contextmanager
def running_triton(repository: Path, log: Path) -> Iterator[Doors]:
    """A Triton with all models of a repository ready. Its output goes to ``log``."""
    install = TritonInstall.find(Settings().runtime_path)
    http, rpc = free_ports(2)
    arguments = [
        f"--model-repository={repository}", f"--backend-directory={install.backends_dir}",
        "--http-address=127.0.0.1", f"--http-port={http}",
        "--grpc-address=127.0.0.1", f"--grpc-port={rpc}",
        "--allow-metrics=false", f"--backend-config=python,shm-region-prefix-name=tidegate-{http}",
    ]  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(
            [install.server, *arguments], env=install.environment({}), stdout=output, stderr=output
        )
    try:
        _wait_ready(process, f"http://127.0.0.1:{http}", log)
        yield Doors(f"http://127.0.0.1:{http}", f"127.0.0.1:{rpc}")
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def _wait_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + PATIENCE_S
    while process.poll() is None and time.monotonic() < end:
        try:
            if httpx.get(f"{url}/v2/health/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError(log.read_text()[-4000:])
