"""Listening sockets that the supervisor keeps, so that a new process of a child can take them over."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping, Sequence

from tidegate.stack.child import Port

Sockets = Mapping[str, Sequence[socket.socket]]


def bound(ports: Mapping[str, Port], count: int) -> Sockets:
    """Return ``count`` bound sockets for each port. Linux spreads connections over sockets of one port.

    Return an empty mapping if a host is a name, because a name can have several addresses. Raise OSError if a
    port is in use.
    """
    if not all(_is_address(port.host) for port in ports.values()):
        return {}
    found: dict[str, list[socket.socket]] = {}
    try:
        for name, port in ports.items():
            found[name] = []
            for _ in range(count):
                found[name].append(_bound(port, shared=count > 1))
    except OSError:
        close(found)
        raise
    return found


def close(sockets: Sockets) -> None:
    """Close all sockets."""
    for each in sockets.values():
        for one in each:
            one.close()


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _bound(port: Port, *, shared: bool) -> socket.socket:
    """Return a socket that does not listen yet. A connection is refused until the child listens."""
    made = socket.socket(socket.AF_INET6 if ":" in port.host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if made.family == socket.AF_INET6:
            made.setsockopt(
                socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1
            )  # as when a service binds its own port
        if shared:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.bind((port.host, port.number))
    except OSError:
        made.close()
        raise
    return made
