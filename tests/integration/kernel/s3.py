"""An S3 server for tests: rclone serves a folder, with its own credentials."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tidegate.stack.ports import free_ports

KEY, SECRET, BUCKET = "tidegate-test", "tidegate-test-secret", "bucket"
START_LIMIT_S = 60.0


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
def running(folder: Path) -> Iterator[dict[str, str]]:
    """Serve ``folder`` while the block runs. Yield the environment for its clients."""
    (folder / "data" / BUCKET).mkdir(parents=True)
    (port,) = free_ports(1)
    command = [
        str(Path(sys.executable).parent / "rclone"), "serve", "s3", str(folder / "data"),
        "--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}", "--config", str(folder / "none"),
    ]  # fmt: skip
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        end = time.monotonic() + START_LIMIT_S
        while not _answers(port):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < end, (folder / "log").read_text()
            time.sleep(0.02)
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
        }
    finally:
        process.terminate()
        process.wait()


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 1.0):
            return True
    except OSError:
        return False
