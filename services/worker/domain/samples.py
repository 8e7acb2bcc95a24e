"""Define sampled calls and streams, which the scheduler passes to the sampler. Pure, without numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from services.worker.domain.split import Output
from tidegate.kernel.protocol.envelope import Buffer

# The maximum number of rows of one call that are counted in the profile.
CALL_ROWS = 256


class SampledCall(NamedTuple):
    """A call of the model. ``requests``: the trace and the number of rows of each request.

    ``inputs``: for each input, its bytes in pieces. ``at``: seconds since the epoch.
    """

    key: bytes
    requests: list[tuple[bytes, int]]
    inputs: list[list[Buffer]]
    outputs: list[Output]
    at: float

    @property
    def rows(self) -> int:
        """Return the number of rows of the call. A request without a batch axis counts as one row."""
        return sum(rows or 1 for _, rows in self.requests)

    @property
    def batched(self) -> bool:
        """Return True if the tensors have an axis of rows."""
        return self.requests[0][1] > 0


class SampledStream(NamedTuple):
    """The outputs of the last chunks of a language model's answer to one request.

    ``at``: seconds since the epoch.
    """

    trace: bytes
    answers: Sequence[Sequence[Output]]
    at: float
