"""Take over listening sockets from the supervisor, and tell it when this process is ready.

The supervisor of a stack keeps the gateway's listening sockets, and passes them to each new process. During a
restart, the old and the new process accept connections from the same queue. So no connection is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import socket
from collections.abc import Callable, Mapping, Sequence

# The environment variable with the file descriptors of the listening sockets, by name, for example {"http":
# [7], "grpc": [8]}. If the service has several processes, each list has one descriptor for each process.
SOCKETS = "TIDEGATE_SOCKETS"
# The environment variable with the file descriptor of a pipe. When a process of the service is ready, it
# writes one byte to the pipe.
READY = "TIDEGATE_READY_FD"
POLL_S = 0.05


def numbers(environ: Mapping[str, str]) -> dict[str, list[int]]:
    """Return the file descriptors of inherited sockets, by name."""
    found: dict[str, list[int]] = json.loads(environ.get(SOCKETS) or "{}")
    return found


def inherited(name: str) -> socket.socket | None:
    """Return this process's inherited socket with this name; None if it has none.

    The calling code must call this only once for each name, because the returned socket owns the descriptor
    and closes it.
    """
    found = numbers(os.environ).get(name)
    return socket.socket(fileno=found[0]) if found else None


def close_inherited() -> None:
    """Close all inherited sockets, in a process that only passes them on."""
    for number in {each for found in numbers(os.environ).values() for each in found}:
        with contextlib.suppress(OSError):
            os.close(number)


def refuse_for_member(index: int) -> None:
    """Refuse connections at the sockets of a dead process, until its successor listens there again.

    ``index``: the number of the process among the service's processes.
    """
    for found in numbers(os.environ).values():
        if index < len(found):
            refuse(found[index])


def refuse(number: int) -> None:
    """Refuse connections at a listening socket, until a process listens there again.

    Without this, connections would wait in the socket's queue, although no process accepts them.
    """
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as one:
        one.shutdown(socket.SHUT_RDWR)


def for_member(environ: Mapping[str, str], index: int) -> tuple[dict[str, str], list[int]]:
    """Return the variables for one process of the service, and the file descriptors that it inherits.

    The environment variables are ``SOCKETS`` and ``READY``. ``index``: the number of the process among the
    service's processes.
    """
    mine = {name: [each[index]] for name, each in numbers(environ).items() if index < len(each)}
    passed = [number for each in mine.values() for number in each]
    given = {SOCKETS: json.dumps(mine)} if mine else {}
    if ready := environ.get(READY):
        given[READY] = ready
        passed.append(int(ready))
    return given, passed


def variables(sockets: Mapping[str, Sequence[socket.socket]], ready: int | None) -> dict[str, str]:
    """Return the environment variables for a new process that inherits these sockets.

    ``ready``: the file descriptor of the pipe to which the process writes when it is ready. None: the process
    does not report this.
    """
    named = {name: [each.fileno() for each in found] for name, found in sockets.items()}
    return {SOCKETS: json.dumps(named)} | ({} if ready is None else {READY: str(ready)})


def undecided() -> bool:
    """Return True while a restart waits for this process to become ready."""
    number = os.environ.get(READY)
    if not number:
        return False
    pipe = select.poll()
    pipe.register(int(number), 0)
    if not pipe.poll(0):
        return True
    # The supervisor has closed its end of the pipe: the restart has succeeded or failed, or the supervisor
    # has ended.
    del os.environ[READY]
    with contextlib.suppress(OSError):
        os.close(int(number))
    return False


async def until_ready(problems: Callable[[], Mapping[str, str]]) -> None:
    """Wait in a restart until ``problems`` returns no problem.

    Until then this process must not listen: callers would wait for it, although the old process could answer
    them.
    """
    while undecided() and problems():
        await asyncio.sleep(POLL_S)


def report_ready() -> None:
    """Report to the supervisor that this process is ready, if a restart waits for this process."""
    if undecided():
        with contextlib.suppress(OSError):  # the supervisor has just stopped waiting
            os.write(int(os.environ[READY]), b".")
