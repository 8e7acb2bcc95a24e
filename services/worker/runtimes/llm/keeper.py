"""Run a server, and end it with all its processes when the parent of this process ends.

``python -I -S keeper.py FOLDER COMMAND...``. Standard input is a pipe from the parent. The kernel closes this
pipe when the parent ends, even if the parent is killed. ``FOLDER``, with the server's socket, is removed at
the end. The exit code is the server's.
"""

# pathlib is not used, because its import takes longer than everything else here.
# ruff: noqa: PTH123, PTH208

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
GRACE_S, POLL_MS = 3.0, 100

libc = ctypes.CDLL(None, use_errno=True)


def main(folder: str, command: list[str]) -> int:
    """Run the command until it ends, or until standard input is closed. Return its exit code."""
    # If a process of the server ends, its children become children of this process. So this process can kill
    # them.
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_end_with_parent)
    closed = select.poll()
    closed.register(0, select.POLLHUP | select.POLLIN)
    try:
        while server.poll() is None and not closed.poll(POLL_MS):
            _reap(server.pid)
        server.terminate()
        server.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        pass
    finally:
        _end_all()
        shutil.rmtree(folder, ignore_errors=True)
    return server.returncode if server.returncode is not None else -signal.SIGKILL


def _end_with_parent() -> None:
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _reap(server: int) -> None:
    """Collect the exit codes of the other child processes, so that they do not remain as zombies.

    ``server``: the server's process id. The exit code of the server is collected elsewhere.
    """
    for pid in _children(os.getpid()):
        if pid != server:
            try:
                os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                pass


def _end_all() -> None:
    """Kill all descendants of this process. Stop after 30 s, even if some are left."""
    until = time.monotonic() + 30
    while (found := _children(os.getpid())) and time.monotonic() < until:
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            except (ProcessLookupError, ChildProcessError):
                pass


def _children(parent: int) -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    # The name of a process is in parentheses. It may contain spaces and parentheses, so only
                    # the text after the last parenthesis is read.
                    if int(file.read().rpartition(")")[2].split()[1]) == parent:
                        found.append(int(name))
            except (OSError, ValueError, IndexError):
                continue
    return found


if __name__ == "__main__":
    code = main(sys.argv[1], sys.argv[2:])
    # If a signal ended the server, exit with 128 plus the number of the signal, as a shell does.
    sys.exit(128 - code if code < 0 else code)
