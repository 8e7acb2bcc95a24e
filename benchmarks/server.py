"""Start a peer's server anew, and stop all its processes."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks import install, leftovers, places, stack, workloads
from benchmarks.errors import BenchmarkFailed
from benchmarks.peer import Peer
from benchmarks.stack import StackFailed
from benchmarks.workloads import Exchange, Name, WrongAnswer
from tidegate.stack import processes
from tidegate.stack.errors import StackError
from tidegate.stack.launch import tail
from tidegate.stack.ports import free_ports
from tidegate.stack.standalone import rabbitmq_running, valkey_running

POLL_S = 0.2
GRACE_S = 10.0
REQUEST_LIMIT_S = 30.0
CHECKS = 3
SETTLE_LIMIT_S = 10.0


class NotServing(BenchmarkFailed):
    """A peer cannot be measured here. ``str()`` is the reason."""


@dataclass(frozen=True, slots=True)
class Served:
    """The URL of a server, and the additional headers of a request with a key."""

    url: str
    key: dict[str, str] = field(default_factory=dict)

    def exchange(self, peer: Peer, name: Name) -> Exchange:
        """Return a workload's request to this server."""
        plain = workloads.exchange(name, peer.wires[name])
        return replace(plain, headers=plain.headers | self.key) if peer.keyed else plain


@contextmanager
def serving(peers: Sequence[Peer], names: Sequence[Name]) -> Iterator[Served]:
    """Start the one server of these peers and check its answers to each. Raise NotServing."""
    with ExitStack() as held:
        try:
            if peers[0].role == "tidegate":
                served = held.enter_context(_tidegate(peers))
            else:
                served = Served(held.enter_context(process(peers[0])))
            for peer in peers:
                for name in names:
                    check(served, peer, name)
        except (StackFailed, StackError, OSError, subprocess.SubprocessError) as problem:
            raise NotServing(_one_line(str(problem))) from None
        yield served


def check(served: Served, peer: Peer, name: Name) -> None:
    """Send several requests and compare the answers with those of the model. Raise NotServing."""
    exchange = served.exchange(peer, name)
    # A server may report that it is ready before its routes exist.
    end, right = time.monotonic() + SETTLE_LIMIT_S, 0
    while right < CHECKS:
        problem = _ask(served.url, exchange)
        right = 0 if problem else right + 1
        if problem and time.monotonic() > end:
            raise NotServing(f"{name}: {problem}")
        if problem:
            time.sleep(POLL_S)


def _ask(url: str, exchange: Exchange) -> str:
    """Return the problem of a server's answer; empty if it is right."""
    request = urllib.request.Request(url + exchange.path, data=exchange.body, headers=exchange.headers)
    try:
        with urllib.request.urlopen(request, timeout=REQUEST_LIMIT_S) as answer:
            headers = {key.lower(): value for key, value in answer.headers.items()}
            exchange.check(headers, answer.read())
    except urllib.error.HTTPError as refusal:
        return f"HTTP {refusal.code}: {_one_line(refusal.read()[:300].decode(errors='replace'))}"
    except (OSError, WrongAnswer, LookupError, ValueError, TypeError, AttributeError) as problem:
        return _one_line(str(problem) or repr(problem))
    return ""


@contextmanager
def _tidegate(peers: Sequence[Peer]) -> Iterator[Served]:
    with stack.tidegate(peers[0].server) as running:
        running.deploy(stack.EXAMPLES / "identity" / "model.py", "identity")
        running.deploy(workloads.onnx_model(), "digits")
        running.deploy(stack.MODELS / "mean" / "model.py", "image")
        key = {}
        if any(peer.keyed for peer in peers):
            limits = ("--rate", "1000000", "--burst", "1000000", "--concurrency", "10000")
            made = json.loads(running.command("keys", "create", "bench", *limits, "--json"))
            key["Authorization"] = f"Bearer {made['key']}"
        yield Served(running.url, key)


@contextmanager
def process(peer: Peer, given: Mapping[str, str] | None = None) -> Iterator[str]:
    """Start a peer by its own commands, with the servers that it needs; yield its base URL.

    ``given``: environment variables, instead of those of its own servers. Raise NotServing.
    """
    if peer.has_environment and not install.installed(peer.name):
        raise NotServing(f"not installed: python -m benchmarks.install --only {peer.name}")
    work = places.work_dir(peer.name)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    started: list[subprocess.Popen[bytes]] = []
    with ExitStack() as held:
        # Short, because a Unix socket's path has at most 107 bytes and Ray puts its own far below this one.
        scratch = held.enter_context(
            tempfile.TemporaryDirectory(prefix="tg-bench-", ignore_cleanup_errors=True)
        )
        port = free_ports(1)[0]
        needs = _needs(peer, work, held) if given is None else dict(given)
        env = _environment(peer, port, work, Path(scratch)) | needs
        held.callback(leftovers.clear, leftovers.names())
        held.callback(_stop, started)
        started.extend(_start(peer, command, port, env, work / "server.log") for command in peer.commands)
        url = f"http://127.0.0.1:{port}"
        _wait_ready(peer, url + peer.ready, started, work / "server.log")
        yield url


def _environment(peer: Peer, port: int, work: Path, scratch: Path) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("BENTOML_")}
    if peer.has_environment:
        env |= {
            "PYTHONPATH": f"{places.PEERS / 'shared'}:{peer.folder}",
            "PATH": f"{places.environment(peer.name) / 'bin'}:{env.get('PATH', os.defpath)}",
        }
    spare = free_ports(2)
    return env | {
        "BENCH_PORT": str(port),
        "BENCH_WORK": str(work),
        "BENCH_TMP": str(scratch),
        "BENCH_DIGITS": str(workloads.onnx_model()),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        # Settings without a command-line option: no telemetry, no fixed ports, no files in the home folder.
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray always opens its control ports on every interface. The token keeps others out.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "BENTOML_HOME": str(work / "bentoml"),
        "BENTOML_DO_NOT_TRACK": "True",
        "C_FORCE_ROOT": "1",
        "MLSERVER_DEBUG": "false",
        "MLSERVER_HOST": "127.0.0.1",
        "MLSERVER_HTTP_PORT": str(port),
        "MLSERVER_GRPC_PORT": str(spare[0]),
        "MLSERVER_METRICS_PORT": str(spare[1]),
    }


def _needs(peer: Peer, work: Path, held: ExitStack) -> dict[str, str]:
    found = {}
    if "rabbitmq" in peer.needs:
        found["BENCH_AMQP_URL"] = held.enter_context(rabbitmq_running(work / "rabbitmq"))
    if "valkey" in peer.needs:
        found["BENCH_REDIS_URL"] = held.enter_context(valkey_running(work / "valkey"))
    return found


def _start(
    peer: Peer, command: Sequence[str], port: int, env: dict[str, str], log: Path
) -> subprocess.Popen[bytes]:
    values = {
        "python": str(places.python(peer.name)),
        "bin": str(places.environment(peer.name) / "bin"),
        "ours": sys.executable,
        "port": str(port),
    }
    with log.open("ab") as output:
        return subprocess.Popen(
            [word.format(**values) for word in command],
            cwd=peer.folder if peer.has_environment else places.ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait_ready(peer: Peer, url: str, started: list[subprocess.Popen[bytes]], log: Path) -> None:
    end = time.monotonic() + peer.start_limit_s
    while True:
        try:
            with urllib.request.urlopen(url, timeout=6):
                return
        except (OSError, ValueError) as problem:
            missing = str(problem)
        for process in started:
            if process.poll() is not None:
                raise NotServing(f"exited with {process.returncode}: {_one_line(tail(log))}")
        if time.monotonic() > end:
            text = f"not ready after {peer.start_limit_s:.0f} s ({missing}): {tail(log)}"
            raise NotServing(_one_line(text))
        time.sleep(POLL_S)


def _stop(started: list[subprocess.Popen[bytes]]) -> None:
    """Stop the servers. Then stop processes of their sessions that are still running."""
    sessions = {process.pid for process in started}
    found = [p for process in started if process.poll() is None and (p := processes.find(process.pid))]
    processes.stop(found, GRACE_S)
    for process in started:
        process.wait()
    processes.stop(_members(sessions), 1.0)


def _members(sessions: set[int]) -> list[processes.Process]:
    found = []
    for entry in processes.PROC.iterdir():
        if entry.name.isdigit():
            try:
                member = os.getsid(int(entry.name)) in sessions
            except OSError:
                continue
            if member and (process := processes.find(int(entry.name))):
                found.append(process)
    return found


def _one_line(text: str) -> str:
    """Return a reason for a table's cell: the end of a text, in one line."""
    words = " ".join(text.split())
    return words if len(words) <= 300 else "..." + words[-297:]
