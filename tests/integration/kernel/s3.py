"""S3 servers for tests: rclone serves a folder, with its own credentials; moto has its own environment."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks import places
from tidegate.stack.ports import free_ports

KEY, SECRET, BUCKET = "tidegate-test", "tidegate-test-secret", "bucket"
START_LIMIT_S = 120.0
MOTO = "moto"
SERVERS = ("rclone", MOTO)


@dataclass(frozen=True, slots=True)
class S3:
    """A URL in a running server. ``environment`` has the variables that a client needs."""

    url: str
    environment: dict[str, str]

    def forget_clients(self) -> None:
        """Let the next client read the environment again."""
        from obstore.fsspec import FsspecStore

        FsspecStore.clear_instance_cache()


@contextmanager
def rclone(folder: Path) -> Iterator[dict[str, str]]:
    """Serve ``folder`` while the block runs. Yield the environment for its clients."""
    (folder / "data" / BUCKET).mkdir(parents=True)
    (port,) = free_ports(1)
    command = [
        str(Path(sys.executable).parent / "rclone"), "serve", "s3", str(folder / "data"),
        "--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}", "--config", str(folder / "none"),
    ]  # fmt: skip
    with _running(command, port, folder / "log"):
        yield _environment(port)


@contextmanager
def moto(folder: Path) -> Iterator[dict[str, str]]:
    """Run moto's server while the block runs, with an empty bucket. It accepts every credential."""
    (port,) = free_ports(1)
    program = places.python(MOTO).parent / "moto_server"
    with _running([str(program), "-H", "127.0.0.1", "-p", str(port)], port, folder / "log"):
        httpx.put(f"http://127.0.0.1:{port}/{BUCKET}", timeout=START_LIMIT_S).raise_for_status()
        yield _environment(port)


def _environment(port: int) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
    }


@contextmanager
def _running(command: list[str], port: int, log: Path) -> Iterator[None]:
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        end = time.monotonic() + START_LIMIT_S
        while not _answers(port):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.02)
        yield
    finally:
        process.terminate()
        process.wait()


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 1.0):
            return True
    except OSError:
        return False
