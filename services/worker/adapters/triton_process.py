"""One tritonserver as a child process: start, notice its end, stop, leave nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import signal
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from services.worker.adapters import memory_limit
from services.worker.adapters.triton_install import TritonInstall
from tidegate import telemetry
from tidegate.errors import Unavailable

log = telemetry.logger(__name__)

SHARED_MEMORY = Path("/dev/shm")
POLL_S = 0.005
START_TRIES = 5
WORK_DIR, MODELS = "triton", "models"
# These say which GPUs a replica holds, so no Deployment may choose them for itself.
_DEVICES = frozenset({"CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "NVIDIA_VISIBLE_DEVICES"})


@dataclass(frozen=True)
class TritonOptions:
    """What differs from one Triton to the next. ``TIDEGATE_*`` in the deployment's ``env`` is ignored.

    ``response_cache_mb`` is the most that answers kept for repeated requests take; 0: none are kept.
    """

    replica: str
    threads: int = 1
    env: Mapping[str, str] = field(default_factory=dict)
    auto_complete: bool = True
    start_timeout_s: float = 120.0
    response_cache_mb: int = 0


class TritonProcess:
    """A tritonserver in ``work_dir``, which is its own: model repository, gRPC and HTTP sockets, log.

    Both listen on Unix sockets in that folder (mode 0700): no port is fought over, and only this user can
    load code into it. Metrics are on a free loopback port. The output goes to ``work_dir/triton.log``.
    """

    def __init__(self, install: TritonInstall, work_dir: Path, options: TritonOptions) -> None:
        self._install = install
        self._work_dir = work_dir.absolute()
        self._options = options
        self._process: asyncio.subprocess.Process | None = None
        # Two stacks on one machine may have replicas of the same name, so the folder names the region.
        self._region = "tidegate-" + hashlib.sha256(str(self._work_dir).encode()).hexdigest()[:16]
        self.repository = self._work_dir / MODELS
        self.log_path = self._work_dir / "triton.log"
        self.metrics_port = 0
        self._kills = 0

    def serves(self, install: TritonInstall, options: TritonOptions) -> bool:
        """Whether it runs, and as it would be started with these; ``options.replica`` may differ."""
        alike = replace(options, replica=self._options.replica) == self._options
        return self.running and install == self._install and alike

    @property
    def caches(self) -> bool:
        """Whether it keeps answers for repeated requests."""
        return self._options.response_cache_mb > 0

    @property
    def region(self) -> str:
        """What the names of its shared memory begin with."""
        return self._region

    @property
    def pid(self) -> int:
        """The process id; 0 before the start."""
        return self._process.pid if self._process else 0

    @property
    def target(self) -> str:
        """Where a gRPC channel connects; by way of /proc, as the path of a socket has at most 107 bytes."""
        return f"unix:/proc/{self.pid}/cwd/grpc:1"

    @property
    def http(self) -> str:
        """The path of its HTTP socket, in the same way."""
        return f"/proc/{self.pid}/cwd/http"

    @property
    def running(self) -> bool:
        """Whether the process is there now."""
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Start and wait until gRPC accepts connections; raises Unavailable with the end of Triton's log."""
        self._work_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._work_dir.chmod(0o700)
        self.repository.mkdir(exist_ok=True)
        for attempt in range(1, START_TRIES + 1):
            self._sweep()
            self._kills = memory_limit.kills()
            self.metrics_port = _free_port()
            await self._spawn()
            try:
                async with asyncio.timeout(self._options.start_timeout_s):
                    started = await self._listening()
            except BaseException as problem:
                await self.stop(grace_s=0)
                if isinstance(problem, TimeoutError):
                    raise Unavailable(
                        f"Triton did not start in {self._options.start_timeout_s:g} s: {self.tail()}"
                    ) from None
                raise
            if started:
                return
            if attempt == START_TRIES or "metrics" not in self.tail().lower():
                raise Unavailable(f"Triton ended while it started: {self.tail()}")
            log.info("port taken while Triton started, trying another", extra={"port": self.metrics_port})

    async def wait(self) -> int:
        """Wait until the process has ended; its exit code, negative for a signal."""
        assert self._process is not None, "not started"
        return await self._process.wait()

    async def stop(self, grace_s: float = 10.0) -> None:
        """Ask it to end, kill what is left of it after ``grace_s`` seconds, its Python stubs included.

        With 0 it is killed at once, and a Python model's ``finalize`` does not run.
        """
        if self._process is None:
            return
        models = _descendants(self.pid)
        if self.running and grace_s > 0:
            self._process.terminate()
            # When the models are finalized nothing is left to wait for; Triton itself would look once a
            # second.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    while self.running and any(Path(f"/proc/{pid}").exists() for pid in models):
                        await asyncio.sleep(POLL_S)
        models = _descendants(self.pid) or models
        if self.running:
            self._process.kill()
        await self._process.wait()
        for pid in models:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._sweep()

    def tail(self, lines: int = 12) -> str:
        """The last lines of Triton's log, the informational ones left out; before them, if memory ran out."""
        try:
            text = self.log_path.read_bytes()[-64_000:].decode(errors="replace")
        except FileNotFoundError:
            return ""
        telling = [
            line for line in text.splitlines() if line.strip() and not line.startswith(("I1", "I0", "|", "+"))
        ]
        # Triton does not know what ended its models' processes.
        starved = [memory_limit.TOLD] if memory_limit.kills() > self._kills else []
        return "\n".join([*starved, *telling[-lines:]])

    async def _spawn(self) -> None:
        options = self._options
        threads = str(options.threads)
        environment = self._install.environment(
            dict.fromkeys(
                ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"), threads
            )
            | {key: value for key, value in options.env.items() if _is_the_models(key)}
            # CUDA then numbers the GPUs as `nvidia-smi` lists them.
            | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
            # The launcher's mark: its name for this worker, which of one that waited is not the replica's.
            | {"TIDEGATE_REPLICA": os.environ.get("TIDEGATE_REPLICA", options.replica)}
        )
        # If the worker is killed, its Triton goes with it and does not keep the memory of a replica that is
        # replaced.
        setpriv = shutil.which("setpriv")
        leash = [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []
        with self.log_path.open("wb") as output:
            self._process = await asyncio.create_subprocess_exec(
                *leash, str(self._install.server), *self._arguments(),
                cwd=self._work_dir, env=environment,
                stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=asyncio.subprocess.STDOUT,
            )  # fmt: skip

    def _arguments(self) -> list[str]:
        arguments = [
            f"--id={self._options.replica}",
            f"--model-repository={self.repository}",
            f"--backend-directory={self._install.backends_dir}",
            "--model-control-mode=explicit",
            "--strict-readiness=true",
            "--http-address=unix:http",
            # Without a port it is taken for a TCP address and refused.
            "--http-port=1",
            "--http-thread-count=2",
            "--grpc-address=unix:grpc",
            "--grpc-port=1",
            "--metrics-address=127.0.0.1",
            f"--metrics-port={self.metrics_port}",
            # Its collector thread sleeps through the stop, for a second.
            "--allow-cpu-metrics=false",
            "--exit-timeout-secs=10",
            f"--backend-config=python,shm-region-prefix-name={self._region}",
            f"--backend-config=python,stub-timeout-seconds={int(self._options.start_timeout_s) or 1}",
        ]
        if not self._options.auto_complete:
            arguments.append("--disable-auto-complete-config")
        if self._options.response_cache_mb:
            size = self._options.response_cache_mb * 2**20
            arguments += [
                f"--cache-directory={self._install.caches_dir}",
                f"--cache-config=local,size={size}",
            ]
        return arguments

    async def _listening(self) -> bool:
        """True once the socket accepts, False if the process ended before."""
        while self.running:
            with contextlib.closing(socket.socket(socket.AF_UNIX)) as probe:
                # A Unix socket connects or refuses at once, so this does not block the loop.
                if probe.connect_ex(self.target.removeprefix("unix:")) == 0:
                    return True
            await asyncio.sleep(POLL_S)
        return False

    def _sweep(self) -> None:
        """Take away what a killed Triton leaves: its Python stubs, their shared memory, its sockets."""
        for pid in _members(self._region):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for region in SHARED_MEMORY.glob(f"{self._region}*"):
            region.unlink(missing_ok=True)
        for name in ("grpc:1", "http"):
            (self._work_dir / name).unlink(missing_ok=True)


def repository_in(folder: Path) -> Path:
    """Return the model repository of the Triton of the worker in ``folder``."""
    return (folder / WORK_DIR / MODELS).absolute()


def new_triton(install: TritonInstall, folder: Path, options: TritonOptions) -> TritonProcess:
    """The Triton of the worker in ``folder``, not started yet."""
    triton = TritonProcess(install, folder / WORK_DIR, options)
    # For the launcher: if this process is killed, nobody else knows what to take out of /dev/shm.
    (folder / "shared-memory").write_text(triton.region)
    return triton


def _is_the_models(variable: str) -> bool:
    """Return True if a Deployment may set this variable."""
    return not variable.startswith("TIDEGATE_") and variable not in _DEVICES


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _descendants(pid: int) -> list[int]:
    """Processes below ``pid``, at any depth."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += [child, *_descendants(child)]
    return found


def _members(region: str) -> list[int]:
    """Processes of the Triton that uses this shared memory region, by their command lines, which name it."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if region.encode() in (entry / "cmdline").read_bytes() and int(entry.name) != os.getpid():
                    found.append(int(entry.name))
    return found
