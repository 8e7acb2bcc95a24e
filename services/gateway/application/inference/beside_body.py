"""The input that a request has outside its body: the caller's shared memory, and headers for the model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Protocol

from services.gateway.domain.contract import Beside, is_ours
from services.gateway.domain.shared_memory import Regions, UsesRegions
from tidegate.kernel.protocol.access import Principal

# These headers never go to a model, even if the pattern of ``BesideBody`` matches them.
_SECRET = frozenset({
    "authorization", "proxy-authorization", "cookie", "x-amz-security-token", "x-api-key", "api-key",
})  # fmt: skip
MAX_VALUE = 8192


class OwnedRegions(Protocol):
    """The shared memory of all callers."""

    def of(self, owner: str) -> Regions:
        """Return one caller's regions of shared memory."""


class BesideBody:
    """The input that requests may have outside their bodies. ``forwards``: True if headers go to models."""

    def __init__(self, regions: OwnedRegions | None = None, pattern: str = "") -> None:
        """``regions``: None if callers may not use shared memory.

        ``pattern``: a regular expression. Headers whose whole names match it go to models.
        """
        self._regions = regions
        self._pattern = re.compile(pattern) if pattern else None
        self.forwards = self._pattern is not None

    def headers(self, headers: Mapping[bytes, bytes]) -> Beside:
        """Return the headers of a request that go to the model."""
        return Beside(None, self._forwarded(headers))

    def memory(self, headers: Mapping[bytes, bytes], principal: Principal, refusal: UsesRegions) -> Beside:
        """Return the caller's regions and the headers for the model.

        Raise ``refusal`` if callers may not use shared memory.
        """
        if self._regions is None:
            raise refusal
        return Beside(self._regions.of(principal.id), self._forwarded(headers))

    def _forwarded(self, headers: Mapping[bytes, bytes]) -> dict[str, str]:
        if self._pattern is None:
            return {}
        named = ((name.decode("latin-1"), value) for name, value in headers.items())
        return {
            name: value[:MAX_VALUE].decode("latin-1")
            for name, value in named
            if self._pattern.fullmatch(name)
            and not (name in _SECRET or name.startswith(":") or is_ours(name))
        }
