"""Tell systemd that the stack is ready or stops: sd_notify(3), datagrams to its socket."""

from __future__ import annotations

import socket
from collections.abc import Callable

from tidegate.kernel import telemetry

log = telemetry.logger(__name__)

Notify = Callable[[str], None]
"""Takes lines such as ``READY=1``."""


def ignore(_: str) -> None:
    """Do nothing, for a stack that no service manager started."""


def to(place: str) -> Notify:
    """Return what sends lines to the socket that ``NOTIFY_SOCKET`` names; empty: to nobody.

    A name that begins with ``@`` is an abstract one. A service manager that does not listen is no error.
    """
    if not place:
        return ignore
    address = "\0" + place[1:] if place.startswith("@") else place

    def send(text: str) -> None:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as line_:
                line_.connect(address)
                line_.sendall(text.encode())
        except OSError as error:
            log.warning("the service manager was not told", extra={"problem": str(error)})

    return send


def line(text: str) -> str:
    """Return a text as one short line."""
    return " ".join(text.split())[:200]
