"""The engines of ``benchmarks.llm``: how each is started directly, and deployed on a stack."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from benchmarks import places, smollm2
from benchmarks.errors import BenchmarkFailed
from benchmarks.install import install, installed
from benchmarks.stack import Stack
from deploy.bootstrap.command import Runner
from deploy.bootstrap.step import StepFailed
from tidegate.stack.ports import free_ports
from tidegate.tune.http_call import Target
from tidegate.tune.measurement import GatewayAddress

NAME = "smollm2"
NAMES = ("llamacpp", "vllm")
CONTEXT = 512
START_LIMIT_S = 240.0


class Engine(Protocol):
    """An engine. ``model``: the model's name at its own server."""

    name: str
    title: str
    model: str

    def direct(self, slots: int) -> AbstractContextManager[tuple[str, int]]:
        """Start the engine's own server. Yield its URL and the id of its process."""

    def deploy(self, stack: Stack, slots: int) -> None:
        """Serve the model on a stack, with the same arguments."""


class LlamaCpp:
    """llama.cpp, from the package xllamacpp."""

    name, title, model = "llamacpp", "llama.cpp", NAME

    @contextmanager
    def direct(self, slots: int) -> Iterator[tuple[str, int]]:
        """Start llama.cpp's own HTTP server."""
        work = places.work_dir("llamacpp")
        work.mkdir(parents=True, exist_ok=True)
        plan = {
            "weights": str(smollm2.provide("q4")),
            "name": NAME,
            "slots": slots,
            "context": CONTEXT,
            "kv_total": slots * CONTEXT,
            "threads": threads(),
            "arguments": {},
            "adapters": {},
            "gpus": [],
        }
        (work / "plan.json").write_text(json.dumps(plan))
        (port,) = free_ports(1)
        script = places.PEERS / "llamacpp" / "server.py"
        command = [str(places.python("llamacpp")), str(script), str(work / "plan.json"), str(port)]
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
        with started(command, environment, work / "server.log") as process:
            url = f"http://127.0.0.1:{port}"
            wait_for(f"{url}/health", process, work / "server.log")
            yield url, process.pid

    def deploy(self, stack: Stack, slots: int) -> None:
        """Serve the same file with the same slots, context and threads."""
        stack.deploy(
            smollm2.provide("q4"),
            NAME,
            *("--engine", "llamacpp", "--slots", str(slots), "--context", str(CONTEXT)),
            *("--threads", str(threads())),
        )


class VLlm:
    """vLLM, in the environment of `make vllm`."""

    name, title, model = "vllm", "vLLM", NAME

    @contextmanager
    def direct(self, slots: int) -> Iterator[tuple[str, int]]:
        """Start `vllm serve` with the command that a worker uses, on a port instead of a socket."""
        work, weights = places.work_dir("vllm"), smollm2.provide("hf")
        work.mkdir(parents=True, exist_ok=True)
        rules = _worker_module("vllm_command")
        config = json.loads((weights / "config.json").read_text())
        plan = {
            "engine_python": str(vllm_python()),
            "weights": weights.name,
            "name": NAME,
            "slots": slots,
            "context": CONTEXT,
            "kv_total": slots * CONTEXT,
            "threads": threads(),
            "arguments": {},
            "adapters": {},
            "gpus": [],
        }
        flags = Path("/proc/cpuinfo").read_text()
        bf16 = "amx_bf16" in flags or "avx512_bf16" in flags
        command = rules.command(plan, config, weights.parent, "SOCKET", bf16=bf16)
        (port,) = free_ports(1)
        at = command.index("--uds")
        command[at : at + 2] = ["--host", "127.0.0.1", "--port", str(port)]
        libraries = vllm_python().parent.parent / "lib"
        environment = rules.environment(plan, config, os.environ, libraries, tempfile.gettempdir())
        with started(command, environment, work / "server.log") as process:
            url = f"http://127.0.0.1:{port}"
            wait_for(f"{url}/health", process, work / "server.log")
            yield url, process.pid

    def deploy(self, stack: Stack, slots: int) -> None:
        """Serve the same folder with the same slots, context and threads."""
        stack.deploy(
            smollm2.provide("hf"),
            NAME,
            *("--engine", "vllm", "--slots", str(slots), "--context", str(CONTEXT)),
            *("--threads", str(threads()), "--timeout", "230s"),
        )


def vllm_python() -> Path:
    """Return the Python of vLLM's environment."""
    return places.runtime_dir() / "engines" / "vllm" / "bin" / "python"


def _worker_module(name: str) -> Any:
    """Import a module of the worker's runtime for language models, which is not a package."""
    path = places.ROOT / "services" / "worker" / "runtimes" / "llm" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def available(names: Sequence[str]) -> list[Engine]:
    """Return the engines that can run here; install llama.cpp. Raise BenchmarkFailed without an engine."""
    found: list[Engine] = []
    if "llamacpp" in names:
        try:
            if not installed("llamacpp"):
                install("llamacpp", Runner())
            found.append(LlamaCpp())
        except StepFailed as failure:
            print(f"llama.cpp is not measured. {failure.what} {failure.remedy}")
    if "vllm" in names:
        if vllm_python().exists():
            found.append(VLlm())
        else:
            print("vLLM is not measured, because it is not installed: make vllm")
    if not found:
        raise BenchmarkFailed("No engine can be measured.")
    return found


def threads() -> int:
    """Return the number of CPU threads of an engine: one for each core."""
    return len(os.sched_getaffinity(0))


def target(url: str) -> Target:
    """Return the address for chats, with a long timeout for requests that wait for a slot."""
    return Target(GatewayAddress.of(url), "/v1/chat/completions", "", {"X-Request-Timeout-Ms": "600000"})


@contextmanager
def started(
    command: Sequence[str], environment: dict[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server, and end it after the block."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a server answers. Raise BenchmarkFailed if it ends or does not answer in time."""
    end = time.monotonic() + START_LIMIT_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError as problem:
            missing = str(problem)
        if process.poll() is not None:
            raise BenchmarkFailed(f"The engine exited with {process.returncode}. Its log: {log}")
        if time.monotonic() > end:
            raise BenchmarkFailed(
                f"The engine is not ready after {START_LIMIT_S:g} s ({missing}). Its log: {log}"
            )
        time.sleep(0.2)
