"""Check where a webhook may go: the form of its URL, and the addresses of its host. Pure.

The URL is checked when a job is accepted, so that a wrong URL is refused immediately. The addresses are
checked later, when the connection is made, because the host's name may then resolve to other addresses.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

LONGEST_URL = 2048
_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::(?P<port>\d{1,5}))?"
    r"(?P<path>/[^#]*|\?[^#]*)?"
)
_PORTS = {"http": 80, "https": 443}
# All public IPv6 addresses are in this network (global unicast).
_GLOBAL_UNICAST = IPv6Network("2000::/3")
# Networks inside of 2000::/3 that are not public. Two reach an IPv4 network through a tunnel. The third is
# for documentation (RFC 9637).
_NO_RECEIVER = (IPv6Network("2001::/32"), IPv6Network("2002::/16"), IPv6Network("3fff::/20"))
# The well-known prefix of NAT64. An address with this prefix ends with the four bytes of an IPv4 address, and
# this IPv4 address is checked instead. All addresses in the other NAT64 network, 64:ff9b:1::/48 (RFC 8215),
# count as not public. The IPv4 address in such an address may be private, and its bytes may be at another
# place.
_NAT64 = IPv6Network("64:ff9b::/96")

Address = IPv4Address | IPv6Address


@dataclass(frozen=True, slots=True)
class WebhookTarget:
    """A webhook's URL in parts. ``path`` includes the query. ``host`` is in lower case, without brackets."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def origin(self) -> str:
        """Return ``host:port``. Limits and cool-downs of webhooks apply to each such origin."""
        return f"{self.host}:{self.port}"

    @property
    def authority(self) -> str:
        """Return the value of the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


def read_url(url: str) -> WebhookTarget | None:
    """Return the parts of a webhook's URL; None if it is invalid.

    A valid URL begins with http or https, has a host, and has no user.
    """
    found = _URL.fullmatch(url) if len(url) <= LONGEST_URL and url.isascii() and url.isprintable() else None
    if found is None or " " in url:
        return None
    scheme, host, path = found["scheme"], found["host"].lower(), found["path"] or "/"
    port = int(found["port"]) if found["port"] else _PORTS[scheme]
    if not 0 < port < 65536:
        return None
    if host.startswith("["):
        host = host[1:-1]
        if (address := _literal(host)) is None or address.version != 6:
            return None
    return WebhookTarget(scheme, host, port, path if path.startswith("/") else f"/{path}")


def is_public(address: Address) -> bool:
    """Return True if an address is public.

    Addresses of this machine, private addresses and link-local addresses (the metadata services of clouds)
    are not public. An IPv6 address that contains one of these is not public either.
    """
    if isinstance(address, IPv6Address):
        carried = _carried(address)
        if carried is not None:
            return is_public(carried)
        if address not in _GLOBAL_UNICAST or any(address in network for network in _NO_RECEIVER):
            return False
    special = address.is_multicast or address.is_reserved or address.is_unspecified
    return address.is_global and not special


def _carried(address: IPv6Address) -> IPv4Address | None:
    """Return the IPv4 address inside of an IPv6 address, or None."""
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return IPv4Address(int(address) & 0xFFFFFFFF) if address in _NAT64 else None


def _literal(host: str) -> Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None
