"""Run one tritonserver as a child process: start it, wait for its end, stop it, and clean up."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import signal
import socket
from dataclasses import replace
from pathlib import Path

from services.worker.adapters import memory_limit
from services.worker.adapters.memory_limit import MemoryLimit
from services.worker.adapters.model_log import ModelLog
from services.worker.adapters.process_table import descendants, kill_all, naming, start_ticks
from services.worker.adapters.sandbox import FileNeeds, Sandbox
from services.worker.adapters.triton_command import TritonOptions, arguments, environment
from services.worker.adapters.triton_install import TritonInstall
from tidegate.kernel import telemetry
from tidegate.kernel.errors import Unavailable

log = telemetry.logger(__name__)

SHARED_MEMORY = Path("/dev/shm")
POLL_S = 0.005
START_TRIES = 5
TAIL_BYTES = 64_000
WORK_DIR, MODELS = "triton", "models"


class TritonProcess:
    """A tritonserver with its own folder, ``work_dir``:

    models/       the model repository, which the model can read
    home/         the model's HOME, if it runs as a separate user
    run-<n>/      the working folder of the n-th start, with the gRPC and HTTP sockets
    triton.log    the last part of the output of Triton and its models

    Only the worker can add or remove entries of ``work_dir``, so a model cannot replace these folders. Triton
    serves its metrics on a free loopback port.
    """

    def __init__(
        self,
        install: TritonInstall,
        work_dir: Path,
        options: TritonOptions,
        sandbox: Sandbox | None = None,
        memory: MemoryLimit | None = None,
    ) -> None:
        self._install = install
        self._memory = memory
        self.sandbox = sandbox or Sandbox.off()
        self._work_dir = work_dir.absolute()
        self._options = options
        self._process: asyncio.subprocess.Process | None = None
        self._region = region_of(self._work_dir)
        self.repository = self._work_dir / MODELS
        self.log_path = self._work_dir / "triton.log"
        self._log = ModelLog(self.log_path, options.log_bytes_per_s)
        self.metrics_port = 0
        self._kills = 0
        self._starts = 0
        self._handle = -1

    def is_like(self, install: TritonInstall, options: TritonOptions) -> bool:
        """Return True if this Triton runs with this installation and these options.

        The replica's name in the options may differ.
        """
        alike = replace(options, replica=self._options.replica) == self._options
        return self.running and install == self._install and alike

    @property
    def has_response_cache(self) -> bool:
        """Return True if this Triton has a response cache."""
        return self._options.response_cache_mb > 0

    @property
    def region(self) -> str:
        """Return the prefix for the names of this Triton's shared memory."""
        return self._region

    @property
    def pid(self) -> int:
        """Return the pid of Triton; 0 before the start."""
        return self._process.pid if self._process else 0

    @property
    def shared_memory(self) -> Path:
        """Return the folder that Triton sees as /dev/shm."""
        return SHARED_MEMORY / self._region if self.sandbox.mounts else SHARED_MEMORY

    @property
    def target(self) -> str:
        """Return the address of Triton's gRPC socket, as the target of a gRPC channel."""
        return f"unix:{self._socket('grpc:1')}"

    @property
    def http(self) -> str:
        """Return the path of Triton's HTTP socket."""
        return self._socket("http")

    @property
    def _run_dir(self) -> Path:
        return self._work_dir / f"run-{self._starts}"

    def _socket(self, name: str) -> str:
        # A socket's path can have at most 107 bytes. So this path names the folder by a file descriptor,
        # which is short. Each start has a new path. With the same path, a new gRPC channel would share the
        # state of the channels to the earlier Triton.
        return f"/proc/self/fd/{self._handle}/run-{self._starts}/{name}"

    @property
    def running(self) -> bool:
        """Return True if the process is running."""
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Start Triton and wait until gRPC accepts calls.

        Raises Unavailable, with the end of the log, if Triton does not start.
        """
        self._work_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self._handle < 0:
            self._handle = os.open(self._work_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        for attempt in range(1, START_TRIES + 1):
            await asyncio.to_thread(self._sweep)
            self._starts += 1
            if self._memory is not None:
                self._memory.open()
            self._kills = self._killed()
            self.metrics_port = _free_port()
            await self._spawn()
            try:
                async with asyncio.timeout(self._options.start_timeout_s):
                    started = await self._listening()
            except BaseException as problem:
                await self.stop(grace_s=0)
                if isinstance(problem, TimeoutError):
                    raise Unavailable(
                        f"Triton did not start within {self._options.start_timeout_s:g} s: {self.tail()}"
                    ) from None
                raise
            if started:
                return
            if attempt == START_TRIES or "metrics" not in self.tail().lower():
                raise Unavailable(f"Triton ended while it started: {self.tail()}")
            log.info(
                "Triton's port is already in use; the worker tries another port",
                extra={"port": self.metrics_port},
            )

    async def wait(self) -> int:
        """Wait until Triton ends. Return its exit code; -N if signal N killed it."""
        assert self._process is not None, "not started"
        return await self._process.wait()

    @property
    def ran_out_of_memory(self) -> bool:
        """Return True if, since the last start, a process was killed because memory ran out."""
        return self._killed() > self._kills

    @property
    def memory_limit(self) -> str:
        """Return a text about Triton's memory limit; empty if the worker does not enforce one."""
        return self._memory.description if self._memory is not None else ""

    def _killed(self) -> int:
        return memory_limit.kills() if self._memory is None else self._memory.kills

    def descendants(self) -> list[int]:
        """Return the pids of all descendants of Triton's process."""
        return descendants(self.pid) if self.running else []

    def kill(self) -> None:
        """Kill Triton, but do not wait for its end. Call :meth:`stop` to clean up."""
        if self._process is not None and self.running:
            self._process.kill()

    async def stop(self, grace_s: float = 10.0) -> None:
        """Stop Triton, and kill the Python stubs (its processes that run Python models).

        Triton is asked to end. If it still runs after ``grace_s`` seconds, it is killed. If ``grace_s`` is 0,
        it is killed immediately, and ``finalize`` of a Python model does not run.
        """
        if self._process is None:
            self._let_go()
            return
        models = start_ticks(descendants(self.pid))
        if self.running and grace_s > 0:
            self._process.terminate()
            # Kill Triton as soon as the models' processes have ended. Triton checks only once a second
            # whether they have ended, so without the kill it would run for up to one more second.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    while self.running and any(Path(f"/proc/{pid}").exists() for pid in models):
                        await asyncio.sleep(POLL_S)
        models = start_ticks(descendants(self.pid)) or models
        if self.running:
            self._process.kill()
        await self._process.wait()
        kill_all(models)
        await asyncio.to_thread(self._sweep)
        if self._memory is not None:
            await self._memory.close()
        self._let_go()

    def tail(self, lines: int = 12) -> str:
        """Return the last warnings and errors of Triton's log. If memory ran out, the first line says so."""
        self._log.catch_up()
        try:
            with self.log_path.open("rb") as output:
                # Read only the end, because a model can make its log very large.
                output.seek(max(0, output.seek(0, os.SEEK_END) - TAIL_BYTES))
                text = output.read(TAIL_BYTES).decode(errors="replace")
        except FileNotFoundError:
            return ""
        lines_to_show = [
            line for line in text.splitlines() if line.strip() and not line.startswith(("I1", "I0", "|", "+"))
        ]
        # Triton's log does not say that memory ran out, so this line says it.
        message = memory_limit.OUT_OF_MEMORY if self._memory is None else self._memory.message
        starved = [message] if self.ran_out_of_memory else []
        return "\n".join([*starved, *lines_to_show[-lines:]])

    def _let_go(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    async def _spawn(self) -> None:
        options = arguments(self._install, self._options, self.repository, self._region, self.metrics_port)
        command = [str(self._install.server), *options]
        self._process = None
        self.log_path.write_bytes(b"")
        # Output goes through a pipe, so that it can be limited before it is written to disk.
        with self._log.writer() as output:
            while self._process is None:
                needs = self._lay_out()
                variables = environment(self._install, self._options, self.sandbox, self._work_dir / "home")
                self._process = await self.sandbox.spawn(
                    needs, command, variables, stdout=output, stderr=asyncio.subprocess.STDOUT
                )
        if self._memory is not None:
            self._memory.watch(lambda: [self.pid, *self.descendants()] if self.running else [])

    def _lay_out(self) -> FileNeeds:
        """Create the folders for one start of Triton. Return the paths that Triton needs.

        The folders get the owners that the sandbox needs.
        """
        home = self._work_dir / "home"
        for folder in (self.repository, self._run_dir):
            folder.mkdir(exist_ok=True, mode=0o700)
        read, write = [self.repository, *self._install.roots()], list[Path]()
        needs = FileNeeds(self._run_dir, read, write, group=self._memory.group if self._memory else None)
        self._work_dir.chmod(0o700)
        self.repository.chmod(0o755)
        self.sandbox.choose_degree(needs)
        self.sandbox.let_through(self._work_dir)
        self.sandbox.let_through(self.repository, to_read=True)
        self.sandbox.make_private(self._run_dir)
        if self.sandbox.user is not None:
            self.sandbox.make_private(home)
            write.append(home)
        if self.sandbox.mounts:
            self.sandbox.make_private(self.shared_memory)
            needs = replace(needs, shared_memory=self.shared_memory)
        return needs

    async def _listening(self) -> bool:
        """Wait until the socket accepts connections. Return False if the process ends before that."""
        while self.running:
            with contextlib.closing(socket.socket(socket.AF_UNIX)) as probe:
                # A Unix socket connects or refuses immediately, so this does not block the event loop.
                if probe.connect_ex(self.target.removeprefix("unix:")) == 0:
                    return True
            await asyncio.sleep(POLL_S)
        return False

    def _sweep(self) -> None:
        """Kill the Python stubs of a Triton that ended, and remove its shared memory and sockets."""
        for pid in naming(self._region):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        self.sandbox.end_all()
        for region in SHARED_MEMORY.glob(f"{self._region}*"):
            if region.is_dir() and not region.is_symlink():
                shutil.rmtree(region, ignore_errors=True)
            else:
                region.unlink(missing_ok=True)
        for folder in self._work_dir.glob("run-*"):
            shutil.rmtree(folder, ignore_errors=True)


def repository_in(folder: Path) -> Path:
    """Return the model repository of the worker in ``folder``."""
    return (folder / WORK_DIR / MODELS).absolute()


def region_of(work_dir: Path) -> str:
    """Return the name for the shared memory and the cgroup of a Triton in ``work_dir``."""
    # The name comes from the folder, because two stacks on one machine may have replicas of the same name.
    return "tidegate-" + hashlib.sha256(str(work_dir.absolute()).encode()).hexdigest()[:16]


def new_triton(
    install: TritonInstall, folder: Path, options: TritonOptions, sandbox: Sandbox | None = None
) -> TritonProcess:
    """Return a Triton, not yet started, for the worker in ``folder``."""
    work_dir = folder / WORK_DIR
    memory = memory_limit.read_limit(folder, region_of(work_dir))
    triton = TritonProcess(install, work_dir, options, sandbox, memory)
    # If this process is killed, the launcher reads this file to clean /dev/shm.
    (folder / "shared-memory").write_text(triton.region)
    return triton


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
