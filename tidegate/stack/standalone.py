"""Run children without a supervisor during a block, for integration tests and benchmarks."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tidegate.stack import launch, probes, processes, rabbitmq, valkey
from tidegate.stack.child import Child
from tidegate.stack.errors import ChildFailed
from tidegate.stack.ports import free_ports

POLL_S = 0.1


@contextmanager
def running(children: Sequence[Child], log_folder: Path) -> Iterator[None]:
    """Start the children one after another, and stop all of them after the block.

    Before each next start, wait until the previous child is ready.
    """
    started: list[tuple[Child, subprocess.Popen[bytes]]] = []
    try:
        for child in children:
            log = log_folder / f"{child.name}.log"
            started.append((child, launch.spawn(child, log)))
            _wait_ready(child, started[-1][1], log)
        yield
    finally:
        for child, process in sorted(started, key=lambda pair: pair[0].stop_order):
            stop(process, child.grace_s)


@contextmanager
def rabbitmq_running(folder: Path, *, ack_timeout_s: float = 1800.0) -> Iterator[str]:
    """Run a RabbitMQ on free ports, with all files below ``folder``. Yield its AMQP URL."""
    port, dist_port, epmd_port = free_ports(3)
    children = rabbitmq.children(
        folder / "data",
        port=port,
        dist_port=dist_port,
        epmd_port=epmd_port,
        environ=os.environ,
        ack_timeout_s=ack_timeout_s,
    )
    with running(children, folder):
        yield f"amqp://guest:guest@127.0.0.1:{port}/"


@contextmanager
def valkey_running(folder: Path, *, port: int | None = None) -> Iterator[str]:
    """Run a Valkey for live facts, such as heartbeats. Yield its URL.

    All its files are below ``folder``. ``port``: None for a free port.
    """
    number = port or free_ports(1)[0]
    with running([valkey.child(folder / "data", port=number, environ=os.environ)], folder):
        yield f"redis://127.0.0.1:{number}/0"


@contextmanager
def jobs_running(folder: Path, *, port: int | None = None) -> Iterator[str]:
    """Run a Valkey for jobs. Yield its URL.

    A later call with the same ``folder`` finds the same data. ``port``: None for a free port.
    """
    number = port or free_ports(1)[0]
    with running([valkey.jobs_child(folder / "data", port=number, environ=os.environ)], folder):
        yield f"redis://127.0.0.1:{number}/0"


def stop(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """Stop a child of this process. If it still runs after ``grace_s`` seconds, kill its whole group."""
    identity = processes.find(process.pid)
    if process.poll() is None and identity:
        processes.stop([identity], grace_s)
    process.wait()


def _wait_ready(child: Child, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + child.start_limit_s
    while child.probe and (missing := probes.problem(child.probe)):
        if process.poll() is not None:
            raise ChildFailed(f"{child.name} exited with {process.returncode}:\n{launch.tail(log)}")
        if time.monotonic() > end:
            raise ChildFailed(
                f"{child.name}: {missing} after {child.start_limit_s:.0f} s:\n{launch.tail(log)}"
            )
        time.sleep(POLL_S)
