"""The token of one replica. With it, the replica may read its own artifact at the registry while it runs.

The token is ``trt_<replica>_<signature>``. The signature is an HMAC-SHA256 of the replica's name, keyed with
the service token, so autoscaler and registry compute it without storing it. A valid signature is not enough:
the registry also checks that the replica runs (see :class:`Replicas`).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field

PREFIX = "trt_"
_BEARER = b"Bearer "


def issue(service_token: str, replica: str) -> str:
    """Return the token of a replica."""
    return f"{PREFIX}{replica}_{_signature(service_token, replica)}"


def holder(service_token: str, authorization: bytes) -> str | None:
    """Return the replica whose token an Authorization header contains; None if the token is not valid."""
    if not service_token or not authorization.startswith(_BEARER + PREFIX.encode()):
        return None
    token = authorization[len(_BEARER) + len(PREFIX) :].decode("latin-1")
    replica, _, signature = token.rpartition("_")
    expected = _signature(service_token, replica)
    return replica if hmac.compare_digest(signature.encode("latin-1"), expected.encode()) else None


def _signature(service_token: str, replica: str) -> str:
    message = b"tidegate replica token\0" + replica.encode("latin-1", "replace")
    return hmac.new(service_token.encode(), message, hashlib.sha256).hexdigest()


@dataclass(slots=True)
class Replicas:
    """The replicas that run now, each with the sha256 of the artifact that it may read."""

    artifacts: Mapping[str, str] = field(default_factory=dict)

    def may_read(self, replica: str, sha256: str) -> bool:
        """Return True if the replica runs and the artifact is its own."""
        return self.artifacts.get(replica) == sha256
