"""Run several gateway processes behind one port; Linux spreads connections over them (SO_REUSEPORT)."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tidegate.kernel import telemetry
from tidegate.kernel.service import handover

log = telemetry.logger(__name__)

MEMBER = "TIDEGATE_GATEWAY_MEMBER"
METRICS = "PROMETHEUS_MULTIPROC_DIR"
BACKOFF_S = (0.2, 5.0)
HEALTHY_AFTER_S = 10.0
POLL_S = 0.1

_COMMAND = [sys.executable, "-P", "-m", "services.gateway"]


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that shares its port with the sockets of the other processes."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind((host, port))
    return listener


class Member(NamedTuple):
    """A gateway process: its number, and when it started.

    The number determines which of the inherited sockets the process gets.
    """

    number: int
    since: float


class Members:
    """A parent of gateway processes: it starts them, restarts dead ones, and forwards signals.

    ``metrics_dir``: the folder of the metrics. Each parent makes its own folder in ``metrics_dir``, because
    two parents run during a restart.
    """

    def __init__(self, count: int, metrics_dir: Path) -> None:
        # The processes write their metrics to shared files, so each process can return the metrics of all
        # processes.
        metrics_dir.mkdir(parents=True, exist_ok=True)
        for each in metrics_dir.iterdir():
            alive = each.name.isdecimal() and Path("/proc", each.name).exists()
            if not each.is_dir() or not alive or each.name == str(os.getpid()):
                shutil.rmtree(each, ignore_errors=True)
                each.unlink(missing_ok=True)
        self._metrics_dir = metrics_dir / str(os.getpid())
        self._metrics_dir.mkdir(exist_ok=True)
        self._env = os.environ | {MEMBER: "1", METRICS: str(self._metrics_dir)}
        self._env.pop(handover.READY, None)
        self._alive: dict[subprocess.Popen[bytes], Member] = {}
        self._count = count
        self._stopping = self._failed = False
        # The numbers whose process has once run for HEALTHY_AFTER_S. If such a process dies, its sockets
        # refuse connections until its successor listens. At the sockets of other numbers, connections wait
        # for the successor.
        self._proven: set[int] = set()
        self._sent = signal.SIGTERM
        self._delay = BACKOFF_S[0]

    def run(self) -> int:
        """Run the gateway processes until a signal arrives, or until a restart of the gateway fails.

        The restart fails if a process dies before the restart is decided. Return 0 if every process ended
        without an error.
        """
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        signal.signal(signal.SIGUSR1, self._retire)
        # If this process is killed, its children must end, too. Otherwise they would share the port with the
        # processes of the next gateway.
        setpriv = shutil.which("setpriv")
        prefix = [setpriv, "--pdeathsig", "TERM", "--"] if setpriv else []
        if not setpriv:
            log.warning("setpriv is missing: if this process is killed, its child processes continue to run")
        while not self._stopping:
            while len(self._alive) < self._count and not self._stopping:
                taken = {member.number for member in self._alive.values()}
                index = next(each for each in range(self._count) if each not in taken)
                variables, passed = handover.for_member(os.environ, index)
                process = subprocess.Popen([*prefix, *_COMMAND], env=self._env | variables, pass_fds=passed)
                self._alive[process] = Member(index, time.monotonic())
            time.sleep(POLL_S)
            self._replace_dead()
        self._send(self._sent)  # end a process that started while the signal was sent, and did not get it
        codes = [int(self._failed), *(member.wait() for member in self._alive)]
        return max(map(abs, codes), default=0)

    def _replace_dead(self) -> None:
        # Until a restart is decided, the old gateway accepts connections at the same sockets. So the sockets
        # of a dead new process need not refuse connections.
        restarting = handover.undecided()
        for member, (number, since) in list(self._alive.items()):
            code = member.poll()
            if time.monotonic() - since > HEALTHY_AFTER_S:
                self._proven.add(number)
            if code is None:
                continue
            del self._alive[member]
            if restarting:
                log.error("a gateway process does not start; the restart fails", extra={"code": code})
                self._failed = True
                self._stop()
                return
            if number in self._proven:
                handover.refuse_for_member(number)  # the other processes get the connections meanwhile
            log.error(
                "a gateway process ended; another one is started", extra={"pid": member.pid, "code": code}
            )
            _forget_metrics(member.pid, self._metrics_dir)
            lived = time.monotonic() - since
            self._delay = BACKOFF_S[0] if lived > HEALTHY_AFTER_S else min(self._delay * 2, BACKOFF_S[1])
            time.sleep(self._delay)

    def _stop(self, *_: object) -> None:
        self._stopping = True
        handover.close_inherited()
        self._send(signal.SIGTERM)

    def _retire(self, *_: object) -> None:
        """Let each process end its connections, wait for its last streams, and stop.

        SIGTERM ends this wait.
        """
        self._stopping = True
        handover.close_inherited()
        self._send(signal.SIGUSR1)

    def _send(self, number: signal.Signals) -> None:
        self._sent = number
        for member in self._alive:
            if member.poll() is None:
                member.send_signal(number)


def _forget_metrics(pid: int, metrics_dir: Path) -> None:
    """Remove the gauges of a dead process from the shared metrics, and keep its counters."""
    from prometheus_client import multiprocess

    # Pass the folder, because its environment variable (METRICS) is set only in the child processes.
    multiprocess.mark_process_dead(pid, str(metrics_dir))  # type: ignore[no-untyped-call]
