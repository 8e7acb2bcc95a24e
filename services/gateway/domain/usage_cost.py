"""The usage cost of answers, from the figures in their replies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tidegate.kernel.protocol.envelope import Reply
from tidegate.kernel.protocol.usage import tokens


def compute_us(reply: Reply) -> int:
    """Return the request's part of the model call that it shared, in microseconds."""
    return reply.compute_us // max(1, reply.shared)


@dataclass(slots=True)
class UsageCost:
    """The cost of a stream so far. ``queued``: the stream reached a queue, so it counts as used."""

    answers: int = 0
    compute_us: int = 0
    sent: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    queued: bool = False

    def begin(self) -> None:
        """Note that the stream was queued for a model."""
        self.queued = True

    def add(self, reply: Reply, parameters: Mapping[str, Any], sent: int) -> None:
        """Add an answer of ``sent`` bytes. Its token counts cover the stream up to this answer."""
        tokens_in, tokens_out = tokens(parameters)
        self.answers += 1
        self.compute_us += compute_us(reply)
        self.sent += sent
        self.tokens_in = max(self.tokens_in, tokens_in)
        self.tokens_out = max(self.tokens_out, tokens_out)
