"""``python -m benchmarks.artifacts``: upload and download a large artifact, with bounds on memory.

``tidegate deploy`` uploads an archive of pseudo-random bytes. Halfway, the command and the registry are
killed with -9. Both are started again, and the upload continues. Then a process with a worker's modules
downloads the artifact with a replica's token. Neither it nor the registry may need more than 200 MiB.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks import places
from tidegate.kernel.protocol import replica_token
from tidegate.stack.ports import free_ports

MIB = 2**20
LIMIT_MIB = 200
PART_BYTES = 8 * MIB  # the size of a part that the registry asks for
POLL_S = 0.01
START_S, STEP_S = 120.0, 3600.0
TOKEN, MODEL, REPLICA = "artifacts-benchmark", "large", "large-v1-a"
SOURCE = b"import numpy as np\n\n\ndef predict(x: np.ndarray) -> np.ndarray:\n    return x\n"
SIGNATURE = {
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [2]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [2]}],
}


@dataclass(frozen=True, slots=True)
class Measured:
    """Peaks of resident memory in MiB, times in seconds, sizes in bytes."""

    size: int
    killed_at: int
    sent_later: int
    registry_mib: float
    worker_mib: float
    upload_s: float
    download_s: float

    def problems(self) -> list[str]:
        """Return which bounds do not hold."""
        found = [
            f"{name} needed {peak:.0f} MiB, more than {LIMIT_MIB}"
            for name, peak in (("the registry", self.registry_mib), ("the worker", self.worker_mib))
            if peak > LIMIT_MIB
        ]
        if self.killed_at + self.sent_later > self.size + PART_BYTES:
            found.append(f"{self.killed_at} bytes were stored at the kill, and {self.sent_later} sent later")
        return found


class Bench:
    """A registry as a process of its own, in a folder of its own."""

    def __init__(self, folder: Path, store: str) -> None:
        self._folder = folder
        (self._port,) = free_ports(1)
        self._log = (folder / "log").open("ab")
        self.url = f"http://127.0.0.1:{self._port}"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("TIDEGATE_")}
        self.environment = kept | {
            "TIDEGATE_STATE_DIR": str(folder),
            "TIDEGATE_SERVICE_TOKEN": TOKEN,
            "TIDEGATE_REGISTRY_PORT": str(self._port),
            "TIDEGATE_ARTIFACT_URL": store,
            "TIDEGATE_VERIFICATION": "off",
            "TIDEGATE_AMQP_URL": "amqp://guest:guest@127.0.0.1:9/",  # nothing listens there
        }
        self._python("-m", "services.registry", "migrate").wait()
        self.registry = self._started()
        self.peak_mib = 0.0

    def restart(self) -> None:
        """Kill the registry with -9, and start it again."""
        self._note_peak()
        self.registry.kill()
        self.registry.wait()
        self.registry = self._started()

    def stop(self) -> None:
        """Stop the registry, and note its peak of memory."""
        self._note_peak()
        self.registry.send_signal(signal.SIGTERM)
        self.registry.wait()
        self._log.close()

    def get(self, path: str) -> Any:
        """Return a document of the registry."""
        answer = httpx.get(f"{self.url}{path}", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60)
        answer.raise_for_status()
        return answer.json()

    def parts(self) -> int:
        """Return how many parts this registry has received since its start."""
        answer = httpx.get(f"{self.url}/metrics", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60)
        found = re.findall(r'requests_total\{method="PATCH",.*status="200"\} (\S+)', answer.text)
        return int(sum(map(float, found)))

    def upload(self, archive: Path) -> subprocess.Popen[bytes]:
        """Start the command that uploads and registers the archive."""
        signature = self._folder / "signature.json"
        signature.write_text(json.dumps(SIGNATURE))
        return self._python(
            "-m", "tidegate.cli", "deploy", str(archive), "--name", MODEL, "--model-format", "python",
            "--signature", str(signature), "--no-wait",
        )  # fmt: skip

    def download(self, sha256: str, size: int) -> dict[str, Any]:
        """Download the artifact in a process with a worker's modules. Return what that process reports."""
        running = {"artifacts": {REPLICA: sha256}}
        headers = {"Authorization": f"Bearer {TOKEN}"}
        httpx.put(f"{self.url}/v1/replicas", json=running, headers=headers).raise_for_status()
        command = [
            sys.executable, "-m", "benchmarks.artifacts", "--fetch", self.url, sha256, str(size),
            str(self._folder / "cache"),
        ]  # fmt: skip
        hidden = {name for name in self.environment if name.startswith("AWS_")}
        bare = {name: value for name, value in self.environment.items() if name not in hidden}
        done = subprocess.run(command, env=bare, check=True, stdout=subprocess.PIPE, stderr=self._log)
        report: dict[str, Any] = json.loads(done.stdout)
        return report

    def log(self) -> str:
        """Return what the processes have printed."""
        return (self._folder / "log").read_text(errors="replace")[-4000:]

    def _python(self, *command: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, *command],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )

    def _started(self) -> subprocess.Popen[bytes]:
        process = self._python("-m", "services.registry")
        end = time.monotonic() + START_S
        while time.monotonic() < end and process.poll() is None:
            with suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health/ready").status_code == 200:
                    return process
            time.sleep(POLL_S)
        raise SystemExit(f"The registry did not start: {self.log()}")

    def _note_peak(self) -> None:
        self.peak_mib = max(self.peak_mib, peak_mib(self.registry.pid))


def measure(size: int, folder: Path, store: str) -> Measured:
    """Upload and download an artifact of ``size`` bytes; ``store`` is the URL of the artifact store."""
    archive = folder / "large.zip"
    write_archive(archive, size)
    bench = Bench(folder, store)
    try:
        began = time.monotonic()
        killed_at, kill_s = _kill_at_half(bench, archive)
        restarted = time.monotonic()
        command = bench.upload(archive)
        if command.wait(STEP_S) != 0:
            raise SystemExit(f"The upload failed: {bench.log()}")
        upload_s = time.monotonic() - restarted + kill_s - began
        sent_later = bench.parts() * PART_BYTES
        version = bench.get(f"/v1/models/{MODEL}/versions/1")
        report = bench.download(version["artifact_sha256"], version["artifact_size"])
    finally:
        bench.stop()
    return Measured(
        size=version["artifact_size"],
        killed_at=killed_at,
        sent_later=sent_later,
        registry_mib=bench.peak_mib,
        worker_mib=report["peak_mib"],
        upload_s=upload_s,
        download_s=report["seconds"],
    )


def _kill_at_half(bench: Bench, archive: Path) -> tuple[int, float]:
    """Kill the command halfway through the upload, then the registry. Return the stored bytes, and when."""
    command, half = bench.upload(archive), archive.stat().st_size // 2
    stored = 0
    while stored < half:
        if command.poll() is not None:
            raise SystemExit(f"The upload ended before it could be killed: {bench.log()}")
        stored = max((upload["offset"] for upload in bench.get("/v1/uploads")["items"]), default=0)
        time.sleep(POLL_S)
    command.kill()
    command.wait()
    killed = time.monotonic()
    bench.restart()
    return int(bench.get("/v1/uploads")["items"][0]["offset"]), killed


def write_archive(path: Path, size: int) -> None:
    """Write a zip of a Python model with ``size`` pseudo-random bytes. No two blocks are the same."""
    block = random.Random(7).randbytes(MIB - 8)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.py", SOURCE)
        with archive.open("weights.bin", "w", force_zip64=True) as weights:
            for number, start in enumerate(range(0, size, MIB)):
                weights.write((number.to_bytes(8, "big") + block)[: size - start])


def fetch(url: str, sha256: str, size: int, folder: Path) -> None:
    """Download an artifact as a worker does, and print the time and this process's peak of memory."""
    import services.worker.app  # noqa: F401  a worker has these modules in memory, too
    from services.worker.adapters.artifacts import ArtifactCache
    from services.worker.adapters.host_cache import HostCache

    began = time.monotonic()
    token = replica_token.issue(TOKEN, REPLICA)
    asyncio.run(ArtifactCache(HostCache(folder)).fetch(url, token, sha256, size))
    print(json.dumps({"seconds": time.monotonic() - began, "peak_mib": peak_mib(os.getpid())}))


def peak_mib(pid: int) -> float:
    """Return the most resident memory that a process has had so far, in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


@contextmanager
def work_folder() -> Iterator[Path]:
    """Return an empty folder that is deleted after the block."""
    places.bench_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="artifacts-", dir=places.bench_dir()) as folder:
        yield Path(folder)


def main() -> int:
    """Measure, print a table and return 1 if a bound does not hold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=float, default=5000, metavar="MB", help="size of the artifact (5000)")
    parser.add_argument("--store", metavar="URL", help="artifact store, such as s3://BUCKET/x (a folder)")
    parser.add_argument("--fetch", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.fetch:
        url, sha256, size, folder = given.fetch
        fetch(url, sha256, int(size), Path(folder))
        return 0
    with work_folder() as folder:
        found = measure(int(given.size * 1e6), folder, given.store or f"file://{folder}/artifacts")
    for name, value in asdict(found).items():
        print(f"{name:>14}  {value:,.1f}" if isinstance(value, float) else f"{name:>14}  {value:,}")
    for problem in found.problems():
        print(f"MISS: {problem}")
    return 1 if found.problems() else 0


if __name__ == "__main__":
    sys.exit(main())
