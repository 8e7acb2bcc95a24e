"""The origins whose pages may call the gateway, and the headers that tell a browser so."""

from __future__ import annotations

import re
from collections.abc import Sequence

ANY_ORIGIN = "*"
_ORIGIN = re.compile(r"https?://[A-Za-z0-9._~\[\]:-]+")
# What a page may read of an answer beside its body and the few headers that it always may.
EXPOSED = (
    "Server-Timing",
    "Retry-After",
    "X-Request-Id",
    "RateLimit",
    "RateLimit-Policy",
    "Inference-Header-Content-Length",
    "Location",
    "Preference-Applied",
    "Allow",
    "WWW-Authenticate",
)


class Origins:
    """A set of origins, such as ``https://console.example``; with ``*`` all are in it."""

    def __init__(self, origins: Sequence[str]) -> None:
        self.names = tuple(origins)
        self._all = ANY_ORIGIN in origins
        self._known = frozenset(origin.encode() for origin in origins)

    @classmethod
    def of(cls, text: str) -> Origins:
        """Read origins separated by commas; raises ValueError for what is none."""
        names = [part.strip().rstrip("/") for part in text.split(",") if part.strip()]
        for name in names:
            if name != ANY_ORIGIN and not _ORIGIN.fullmatch(name):
                raise ValueError(
                    f"{name[:80]!r} is no origin: write scheme, host and port of the page's address, such as "
                    "https://console.example or http://localhost:3000; or * for every page"
                )
        return cls(names)

    def __bool__(self) -> bool:
        return bool(self.names)

    def __contains__(self, origin: object) -> bool:
        return self._all or origin in self._known

    def headers(self, origin: bytes) -> list[tuple[bytes, bytes]]:
        """Return what an answer to a page of ``origin``, which is one of these, has in addition."""
        exposed = (b"access-control-expose-headers", ", ".join(EXPOSED).encode())
        if self._all:
            return [(b"access-control-allow-origin", b"*"), exposed]
        return [(b"access-control-allow-origin", origin), (b"vary", b"Origin"), exposed]
