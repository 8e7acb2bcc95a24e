"""Find out which user of this host a caller is, from the caller's TCP connection."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator
from pathlib import Path

_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
# When a program has closed its socket, the kernel still lists the connection until the connection has ended.
# This entry has user 0 and no inode. It is ignored, because the program may belong to another user.
_OPEN, _NO_INODE = "01", "0"
Address = tuple[str, int]


def user_of(client: Address, server: Address) -> int | None:
    """Return the user id of the program that has a connection from ``client`` to ``server``.

    Return None if one of the addresses is not a loopback address. Also return None if the program has closed
    its side of the connection, because the kernel then no longer shows the user.
    """
    here, there = _packed(client), _packed(server)
    if here is None or there is None:
        return None
    for local, remote, user in _connections():
        if (local, remote) == (here, there):
            return user
    return None


def _connections() -> Iterator[tuple[tuple[bytes, int], tuple[bytes, int], int]]:
    for table in _TABLES:
        try:
            lines = table.read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == _OPEN and fields[9] != _NO_INODE:
                yield _listed(fields[1]), _listed(fields[2]), int(fields[7])


def _packed(address: Address) -> tuple[bytes, int] | None:
    try:
        found = ipaddress.ip_address(address[0].partition("%")[0])
    except ValueError:
        return None
    found = getattr(found, "ipv4_mapped", None) or found
    return (found.packed, address[1]) if found.is_loopback else None


def _listed(text: str) -> tuple[bytes, int]:
    """Parse an address in the kernel's table: 32-bit words in this machine's byte order, and a port."""
    words, _, port = text.partition(":")
    packed = b"".join(
        socket.htonl(int.from_bytes(bytes.fromhex(words[at : at + 8]), "big")).to_bytes(4, "big")
        for at in range(0, len(words), 8)
    )
    mapped = packed.removeprefix(bytes(10) + b"\xff\xff")
    return (mapped if len(mapped) == 4 else packed), int(port, 16)
