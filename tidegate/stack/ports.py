"""Find free ports, and the process that uses a port."""

from __future__ import annotations

import errno
import itertools
import os
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

from tidegate.stack import processes
from tidegate.stack.child import MARK, Port
from tidegate.stack.errors import PortBusy

# The lowest port to try. With Linux's default settings, it is below the range from which the kernel assigns
# ports to outgoing connections.
_FIRST = 10_000
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_APART = 997  # Two processes with consecutive pids start their search this many ports apart.


def free_ports(count: int) -> list[int]:
    """Return ``count`` loopback ports that are free now, and will probably stay free until their use.

    If possible, the ports are below the range from which the kernel assigns ports to outgoing connections.
    Each process begins its search at a port that depends on its pid. Each call continues where the last call
    in this process ended. So two calls rarely return the same port.
    """
    return list(itertools.islice(filter(_is_free, _ports), count))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _candidates() -> Iterator[int]:
    end = int(_EPHEMERAL.read_text().split()[0])
    span = range(_FIRST, end) if end - _FIRST > 2 * _APART else range(_FIRST, 2**16)
    at = os.getpid() * _APART
    while True:
        yield span[at % len(span)]
        at += 1


_ports = _candidates()


def check_free(ports: Iterable[Port]) -> None:
    """Raise :class:`PortBusy` if the stack cannot listen on a port.

    If another process uses the port, the message names this process, or a command that finds it.
    """
    complaints = [text for port in ports if (text := _complaint(port))]
    if complaints:
        raise PortBusy("\n".join(complaints))


def _complaint(port: Port) -> str | None:
    with socket.socket(socket.AF_INET6 if ":" in port.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((port.host, port.number))
            return None
        except OSError as error:
            code, text = error.errno, error.strerror
    if code == errno.EADDRINUSE:
        return f"Port {port.number} is used by {_holder(port.number)}, or choose another: {port.setting}=..."
    return f"Cannot listen on {port.host}:{port.number} ({text}); choose another port: {port.setting}=..."


def _holder(number: int) -> str:
    import psutil  # imported here, because a client without psutil must be able to import this module

    listening = (c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN)
    pid = next((c.pid for c in listening if c.laddr and c.laddr.port == number), None)
    process = processes.find(pid) if pid else None
    if process is None:
        return "a process of another user (`sudo ss -ltnp` names it): stop it"
    state = process.environment().get(MARK)
    if state:
        return f"another Tidegate stack, pid {pid} (stop it: TIDEGATE_STATE_DIR={state} tidegate down)"
    return f"pid {pid} ({process.command()}): stop it"
