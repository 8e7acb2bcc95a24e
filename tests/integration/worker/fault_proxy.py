"""A TCP proxy before a real server that delays, cuts off or answers instead of it, as a test says."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from urllib.parse import urlsplit

Fault = Callable[["FaultProxy", socket.socket], None]


class FaultProxy:
    """Forwards each connection to ``address``, unless a fault is planned for it."""

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        self._target = (parts.hostname or "", parts.port or 80)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/v1"
        self.faults: deque[Fault] = deque()
        self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Accept no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            try:
                fault = self.faults.popleft()
            except IndexError:
                fault = forwarded()
            threading.Thread(target=self._serve, args=(fault, client), daemon=True).start()

    def _serve(self, fault: Fault, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            fault(self, client)

    def forward(self, client: socket.socket, *, most_bytes: int | None = None) -> None:
        """Copy both ways. Close the connection after ``most_bytes`` of the answer."""
        with socket.create_connection(self._target) as server:
            threading.Thread(target=_copy, args=(client, server), daemon=True).start()
            _copy(server, client, most_bytes)


def forwarded() -> Fault:
    """Return no fault."""
    return lambda proxy, client: proxy.forward(client)


def cut(most_bytes: int) -> Fault:
    """Close the connection after so many bytes of the answer."""
    return lambda proxy, client: proxy.forward(client, most_bytes=most_bytes)


def closed() -> Fault:
    """Close the connection at once."""
    return lambda proxy, client: None


def answered(status: int, body: bytes, *headers: str) -> Fault:
    """Answer instead of the server."""

    def fault(proxy: FaultProxy, client: socket.socket) -> None:
        client.recv(65536)
        head = "\r\n".join([f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", *headers])
        client.sendall(f"{head}\r\n\r\n".encode() + body)

    return fault


def silent(seconds: float) -> Fault:
    """Answer nothing for a time."""
    return lambda proxy, client: time.sleep(seconds)


def _copy(source: socket.socket, target: socket.socket, most_bytes: int | None = None) -> None:
    """Copy until one side ends, then end the other one."""
    left = most_bytes if most_bytes is not None else 2**62
    with contextlib.suppress(OSError):
        while left > 0 and (data := source.recv(min(left, 65536))):
            target.sendall(data)
            left -= len(data)
    for each in (target, source):
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
