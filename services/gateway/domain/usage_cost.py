"""Compute the usage cost of an answer: what it adds to its caller's usage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.gateway.domain.routing import DeploymentRoute
from tidegate.kernel.protocol.envelope import Reply
from tidegate.kernel.protocol.usage import tokens


def compute_us(reply: Reply) -> int:
    """Return the request's share of the time of its model call, in microseconds."""
    return reply.compute_us // max(1, reply.shared)


@dataclass(slots=True)
class UsageCost:
    """The usage of a stream so far. It is reported only if the stream was ``queued`` for a model.

    ``compute_us``: the stream's share of the time of its model calls. ``whole_us``: the whole time of these
    calls, which other requests may share. ``sent``: the total size of the answers in bytes. ``route``: the
    Deployment of the last answer.
    """

    answers: int = 0
    compute_us: int = 0
    whole_us: int = 0
    sent: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    tokens_cached: int = 0
    queued: bool = False
    route: DeploymentRoute | None = None

    def begin(self) -> None:
        """Record that the stream was queued for a model."""
        self.queued = True

    def add(
        self, reply: Reply, parameters: Mapping[str, Any], sent: int, route: DeploymentRoute | None = None
    ) -> None:
        """Add an answer of ``sent`` bytes. Its ``parameters`` have the token counts of the stream so far."""
        tokens_in, tokens_out = tokens(parameters)
        self.answers += 1
        self.route = route
        self.compute_us += compute_us(reply)
        self.whole_us += reply.compute_us
        self.sent += sent
        self.tokens_in = max(self.tokens_in, tokens_in)
        self.tokens_out = max(self.tokens_out, tokens_out)
