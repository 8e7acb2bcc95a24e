"""Check a request's head: its size, its Host, and the browser page that caused it. Pure."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from functools import lru_cache

from tidegate.kernel.http.answers import Refusal

LOOPBACK = {"localhost", "127.0.0.1", "::1"}
# RFC 9110, 4.2.3: a Host is a name or an address, with an optional port and without user information.
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._~!$&'()*+,;=%-]+))(?::[0-9]{0,5})?")
_ORIGIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://(.+)")
_OF_THE_PAGE = {b"origin", b"sec-fetch-site"}
_FOREIGN_SITES = {b"cross-site", b"same-site"}
# The most digits of a number such as Content-Length. No valid number has more, and int() is slow for long
# ones.
MAX_DIGITS = 19

Fields = Sequence[tuple[bytes, bytes]]


def size(method: bytes, url: bytes, fields: Fields) -> int:
    """Return the size of a head in bytes as the client sent it, without optional white space."""
    return len(method) + len(url) + 14 + sum(len(name) + len(value) + 4 for name, value in fields)


def too_large(max_bytes: int, max_fields: int) -> Refusal:
    """Return the refusal of a head or trailers that exceed a limit."""
    return Refusal(
        431,
        "head_too_large",
        f"The request's head, with trailers and chunk extensions, is over the limit of {max_bytes} bytes "
        f"and {max_fields} fields. Send fewer or shorter headers.",
    )


def problem(fields: Fields, version: str) -> Refusal | None:
    """Return why the Host or Authorization field of a head is refused, or None."""
    hosts = [value for name, value in fields if name == b"host"]
    if len(hosts) > 1:
        return _bad("The request has more than one Host header; send exactly one.")
    if not hosts and version != "1.0":
        return _bad("The request has no Host header; HTTP/1.1 requires one.")
    if hosts and not valid_host(hosts[0]):
        return _bad("The Host header is not a host name or address with an optional port.")
    if sum(name == b"authorization" for name, _ in fields) > 1:
        return _bad("The request has more than one Authorization header; send one.")
    return None


def _bad(message: str) -> Refusal:
    return Refusal(400, "bad_request", message)


@lru_cache(maxsize=256)
def valid_host(host: bytes) -> bool:
    """Return True for a valid Host. RFC 9110 also allows an empty one."""
    return not host or _hostname(host) is not None


def is_local(headers: Mapping[bytes, bytes]) -> bool:
    """Return True for a request from this machine's own programs and pages.

    Host must name loopback. If the request has an Origin, the Origin must name loopback as well. Requests for
    images and links have no Origin. For them, the browser states in ``Sec-Fetch-Site`` whether the page is
    from another site. Requests from another site's page are not local.
    """
    origin = headers.get(b"origin", b"")
    if not origin and headers.get(b"sec-fetch-site") in _FOREIGN_SITES:
        return False
    return _are_local(headers.get(b"host", b""), origin)


def without_page(headers: dict[bytes, bytes], origins: Container[object]) -> dict[bytes, bytes]:
    """Return ``headers``. If the Origin is in ``origins``, leave out the headers about the browser page."""
    origin = headers.get(b"origin")
    if origin is None or origin not in origins:
        return headers
    return {name: value for name, value in headers.items() if name not in _OF_THE_PAGE}


@lru_cache(maxsize=256)
def _are_local(host: bytes, origin: bytes) -> bool:
    if _hostname(host) not in LOOPBACK:
        return False
    if not origin:
        return True
    found = _ORIGIN.fullmatch(origin.decode("latin-1"))
    return found is not None and _hostname(found[1].encode("latin-1")) in LOOPBACK


def _hostname(host: bytes) -> str | None:
    found = _HOST.fullmatch(host.decode("latin-1"))
    return (found[1] or found[2]).lower() if found else None


def number(value: bytes) -> int | None:
    """Return a field's value as a number, or None if it is not a number. Ignore white space around it."""
    digits = value.strip(b" \t")
    return int(digits) if digits.isdigit() and len(digits) <= MAX_DIGITS else None


def without_upgrade(method: bytes, url: bytes, version: str, fields: Fields) -> bytes:
    """Return a head as bytes, without its Upgrade field."""
    lines = [b"%b %b HTTP/%b" % (method, url, version.encode())]
    lines += [name + b": " + value for name, value in fields if name != b"upgrade"]
    return b"\r\n".join((*lines, b"", b""))
