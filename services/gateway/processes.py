"""Several gateway processes behind one port: the kernel spreads connections over them (SO_REUSEPORT)."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from tidegate.kernel import telemetry

log = telemetry.logger(__name__)

MEMBER = "TIDEGATE_GATEWAY_MEMBER"
METRICS = "PROMETHEUS_MULTIPROC_DIR"
BACKOFF_S = (0.2, 5.0)
HEALTHY_AFTER_S = 10.0
POLL_S = 0.1

_COMMAND = [sys.executable, "-P", "-m", "services.gateway"]


def listen(host: str, port: int) -> socket.socket:
    """A socket that shares its port with the sockets of the other members."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    door = socket.socket(family, socket.SOCK_STREAM)
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    door.bind((host, port))
    return door


class Members:
    """Starts the members, replaces one that dies, passes SIGTERM and SIGINT on and waits for all of them."""

    def __init__(self, count: int, metrics_dir: Path) -> None:
        # The members' metrics meet in files, so that a scrape of any of them tells of all.
        shutil.rmtree(metrics_dir, ignore_errors=True)
        metrics_dir.mkdir(parents=True)
        self._metrics_dir = metrics_dir
        self._env = os.environ | {MEMBER: "1", METRICS: str(metrics_dir)}
        self._alive: dict[subprocess.Popen[bytes], float] = {}
        self._count = count
        self._stopping = False
        self._delay = BACKOFF_S[0]

    def run(self) -> int:
        """Until told to stop; 0 when every member ended in order."""
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        # If this process is killed the members end in order, and do not answer beside those of the next one.
        setpriv = shutil.which("setpriv")
        leash = [setpriv, "--pdeathsig", "TERM", "--"] if setpriv else []
        if not setpriv:
            log.warning("no setpriv: should this process be killed, its members go on")
        while not self._stopping:
            while len(self._alive) < self._count and not self._stopping:
                member = subprocess.Popen([*leash, *_COMMAND], env=self._env)
                self._alive[member] = time.monotonic()
            time.sleep(POLL_S)
            self._bury()
        self._stop()  # one that was starting when the signal came has not had it
        codes = [member.wait() for member in self._alive]
        return max(map(abs, codes), default=0)

    def _bury(self) -> None:
        for member, since in list(self._alive.items()):
            code = member.poll()
            if code is None:
                continue
            del self._alive[member]
            log.error("a gateway process ended; starting another", extra={"pid": member.pid, "code": code})
            _forget_metrics(member.pid, self._metrics_dir)
            lived = time.monotonic() - since
            self._delay = BACKOFF_S[0] if lived > HEALTHY_AFTER_S else min(self._delay * 2, BACKOFF_S[1])
            time.sleep(self._delay)

    def _stop(self, *_: object) -> None:
        self._stopping = True
        for member in self._alive:
            if member.poll() is None:
                member.send_signal(signal.SIGTERM)


def _forget_metrics(pid: int, metrics_dir: Path) -> None:
    """Take the gauges of a dead member out of the common view; its counts stay."""
    from prometheus_client import multiprocess

    # By its path: METRICS is set for the members alone.
    multiprocess.mark_process_dead(pid, str(metrics_dir))  # type: ignore[no-untyped-call]
