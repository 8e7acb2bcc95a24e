"""The connections of another process, as sockets of this one: what is done to them happens there."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

PIDFD_GETFD = 438  # the number of the system call, on every architecture


def connections_of(process: psutil.Process, chosen: Callable[[socket.socket], bool]) -> list[socket.socket]:
    """Return the connected sockets of a process that are ``chosen``."""
    call, pidfd = ctypes.CDLL(None, use_errno=True).syscall, os.pidfd_open(process.pid)
    found = []
    for entry in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # it was closed meanwhile, or is not connected
            if not str(entry.readlink()).startswith("socket:"):
                continue
            fd = call(PIDFD_GETFD, pidfd, int(entry.name), 0)
            if fd < 0 and ctypes.get_errno() == errno.EPERM:
                pytest.skip("this user may not reach into the processes of its own (ptrace)")
            if fd < 0:
                continue
            each = socket.socket(fileno=fd)
            if chosen(each):
                found.append(each)
    os.close(pidfd)
    return found


def break_all(connections: list[socket.socket]) -> None:
    """Shut connections down, in both directions."""
    for each in connections:
        each.shutdown(socket.SHUT_RDWR)
        each.close()
