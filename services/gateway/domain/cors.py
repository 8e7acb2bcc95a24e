"""The origins of pages that may call the gateway, and the response headers that browsers need."""

from __future__ import annotations

import re
from collections.abc import Sequence

ANY_ORIGIN = "*"
_ORIGIN = re.compile(r"https?://[A-Za-z0-9._~\[\]:-]+")
# The response headers that a page may read, besides the few that browsers always show to pages.
EXPOSED = (
    "Server-Timing",
    "Retry-After",
    "X-Request-Id",
    "X-Feedback-Id",
    "RateLimit",
    "RateLimit-Policy",
    "Inference-Header-Content-Length",
    "Location",
    "Preference-Applied",
    "Allow",
    "WWW-Authenticate",
)


class Origins:
    """A set of origins, such as ``https://console.example``. With ``*``, all origins are in the set."""

    def __init__(self, origins: Sequence[str]) -> None:
        self.names = tuple(origins)
        self._all = ANY_ORIGIN in origins
        self._known = frozenset(origin.encode() for origin in origins)

    @classmethod
    def of(cls, text: str) -> Origins:
        """Parse origins that are separated by commas; raise ValueError if an origin is invalid."""
        names = [part.strip().rstrip("/") for part in text.split(",") if part.strip()]
        for name in names:
            if name != ANY_ORIGIN and not _ORIGIN.fullmatch(name):
                raise ValueError(
                    f"{name[:80]!r} is not an origin: write scheme, host and port of the page's address, "
                    "such as https://console.example or http://localhost:3000; or * for every page"
                )
        return cls(names)

    def __bool__(self) -> bool:
        return bool(self.names)

    def __contains__(self, origin: object) -> bool:
        return self._all or origin in self._known

    def headers(self, origin: bytes) -> list[tuple[bytes, bytes]]:
        """Return the extra headers of a response to a page of ``origin``.

        ``origin`` must be in the set.
        """
        exposed = (b"access-control-expose-headers", ", ".join(EXPOSED).encode())
        if self._all:
            return [(b"access-control-allow-origin", b"*"), exposed]
        return [(b"access-control-allow-origin", origin), (b"vary", b"Origin"), exposed]
