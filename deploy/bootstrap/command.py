"""Run commands, write their output to logs, and explain their failures."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from deploy.bootstrap.step import StepFailed

EXPLANATIONS = (
    (
        r"CERTIFICATE_VERIFY_FAILED|SSLError|certificate verify failed",
        "This machine does not trust the package index's certificate. Behind a company proxy, set PIP_CERT "
        "to the file with the proxy's CA certificate: PIP_CERT=/path/to/ca.crt make up",
    ),
    (
        r"ProxyError|Tunnel connection failed|407 Proxy",
        "The proxy refused the connection: check HTTPS_PROXY (http://user:password@host:port).",
    ),
    (r"No space left on device", "The disk is full: free about 2 GB, then run the same command again."),
    (
        r"DO NOT MATCH THE HASHES",
        "A downloaded file does not have the hash that the lock file requires. Try again. If that does not "
        "help, the index or mirror in use (`pip config list`) serves altered files.",
    ),
    (
        r"Temporary failure in name resolution|Failed to establish a new connection|Max retries exceeded"
        r"|Read timed out|ConnectTimeout|Network is unreachable|Connection refused|Could not resolve"
        r"|Temporary failure resolving|Failed to fetch",
        "The network did not answer. Check the connection, then run the same command again: finished steps "
        "are kept. Behind a proxy, set HTTPS_PROXY. To use a mirror, set PIP_INDEX_URL.",
    ),
    (
        r"No matching distribution found|Could not find a version",
        "The package index in use (`pip config list`) does not answer, or does not have a package version "
        "that the lock file requires. "
        "Check the connection to the index, and that the index is up to date.",
    ),
    (
        r"Could not get lock|Unable to acquire the dpkg frontend lock",
        "Another program is installing packages. Wait until it has finished, then run the same command "
        "again.",
    ),
    (
        r"dpkg was interrupted",
        "An earlier installation was interrupted. Run `sudo dpkg --configure -a`, then the same command "
        "again.",
    ),
)
OTHERWISE = "Read the log and remove the cause. Then run the same command again: finished steps are kept."


class Runner:
    """Runs commands. :meth:`end` terminates all running commands."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._logs: set[Path] = set()
        self._ended = False

    def run(
        self,
        command: Sequence[str],
        log: Path,
        *,
        what: str,
        on_line: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Run a command to its end. Each output line goes to the log and to ``on_line``.

        Raise StepFailed if the exit code is not 0.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        # The first command that uses a log empties this log. Otherwise :func:`explain` could find an error of
        # an earlier bootstrap.
        mode = "a" if log in self._logs else "w"
        self._logs.add(log)
        with log.open(mode) as output:
            output.write("$ " + " ".join(command) + "\n")
            output.flush()
            code = self._follow(command, output.write, on_line)
        if code != 0:
            raise StepFailed(f"{what} failed (exit code {code}).", explain(log), log)

    def _follow(
        self, command: Sequence[str], write: Callable[[str], object], on_line: Callable[[str], None]
    ) -> int:
        with self._lock:
            if self._ended:
                return 1
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=environment(),
                start_new_session=True,
            )
            self._running.add(process)
        assert process.stdout is not None
        for line in process.stdout:
            write(line)
            on_line(line.strip())
        with self._lock:
            self._running.discard(process)
        return process.wait()

    def end(self) -> None:
        """Terminate the running commands, and start no more commands."""
        with self._lock:
            self._ended = True
            for process in self._running:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGTERM)


def environment() -> dict[str, str]:
    """Return this process's environment without variables that would mislead another Python or pip."""
    misleading = {
        "PYTHONHOME",
        "PYTHONPATH",
        "PIP_TARGET",
        "PIP_PREFIX",
        "PIP_USER",
        "PIP_REQUIRE_VIRTUALENV",
    }
    kept = {k: v for k, v in os.environ.items() if k not in misleading}
    return kept | {"PYTHONUNBUFFERED": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def tail(log: Path, lines: int = 12) -> str:
    """Return the last lines of a log."""
    try:
        return "\n".join(log.read_text(errors="replace").rstrip().splitlines()[-lines:])
    except OSError:
        return ""


def explain(log: Path) -> str:
    """Return the remedy for the error at the end of a log, as text for the user."""
    text = tail(log, 60)
    return next((remedy for pattern, remedy in EXPLANATIONS if re.search(pattern, text)), OTHERWISE)
