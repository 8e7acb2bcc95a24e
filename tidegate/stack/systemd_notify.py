"""Tell systemd when the stack is ready and when it stops.

As in sd_notify(3), this module sends datagrams to a socket of systemd.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from tidegate.kernel import telemetry

log = telemetry.logger(__name__)

Notify = Callable[[str], None]
"""Takes lines such as ``READY=1``."""


def ignore(_: str) -> None:
    """Do nothing, for a stack that was not started by a service manager."""


def to(place: str) -> Notify:
    """Return a function that sends lines to the socket ``place``, or does nothing if ``place`` is empty.

    A ``place`` that begins with ``@`` is an abstract socket. A socket without a listener is not an error.
    """
    if not place:
        return ignore
    address = "\0" + place[1:] if place.startswith("@") else place

    def send(text: str) -> None:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as connection:
                connection.connect(address)
                connection.sendall(text.encode())
        except OSError as error:
            log.warning("systemd could not be notified", extra={"problem": str(error)})

    return send


def line(text: str) -> str:
    """Return a text as one line of at most 200 characters."""
    return " ".join(text.split())[:200]
