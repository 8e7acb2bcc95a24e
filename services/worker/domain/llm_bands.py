"""The order in which a worker takes requests to a language model, and their slots and tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from tidegate.kernel.protocol.llm import BAND_WEIGHTS, Band


class Source(NamedTuple):
    """A queue of a band: the queue that all replicas share, or the replica's own queue."""

    band: Band
    own: bool


class BandTurns:
    """The order in which the bands get slots. If all bands have requests, they share the slots by weight.

    This is start-time fair queueing. The next band is the one with the fewest served requests per weight. An
    empty band saves up at most one turn. Within a band, the replica's own queue and the shared queue
    alternate, so that neither starves.
    """

    def __init__(self, weights: Mapping[Band, int] = BAND_WEIGHTS) -> None:
        self._weights = weights
        self._served: dict[Band, float] = dict.fromkeys(weights, 0.0)
        self._own_next: dict[Band, bool] = dict.fromkeys(weights, True)

    def order(self) -> Iterator[Source]:
        """Yield all queues, in the order in which to look for the next request."""
        for band in sorted(self._served, key=lambda band: self._served[band]):
            own = self._own_next[band]
            yield Source(band, own)
            yield Source(band, not own)

    def served(self, source: Source) -> None:
        """Count a request that was taken from a queue. All earlier queues of :meth:`order` were empty."""
        clock = self._served[source.band]
        self._own_next[source.band] = not source.own
        for band, served in self._served.items():
            if served < clock:  # the band had no request before: it loses all missed turns but one
                self._served[band] = max(served, clock - 1 / self._weights[band])
        self._served[source.band] += 1 / self._weights[source.band]


class LlmRoom:
    """The slots of an engine and the tokens in its KV cache: how many there are, and how many are used.

    If ``kv_tokens`` is None, tokens are not limited.
    """

    def __init__(self, slots: int, kv_tokens: int | None) -> None:
        self.slots = slots
        self.kv_tokens = kv_tokens
        self.used = 0
        self.used_tokens = 0

    def fits(self, tokens: int, *, others: int = 0) -> bool:
        """Return True if a slot and ``tokens`` are free for one more request.

        ``others``: the number of slots that jobs use. A request that is larger than the whole cache can start
        alone. Then the engine accepts or refuses it.
        """
        if self.used + others >= self.slots:
            return False
        return self.kv_tokens is None or self.used == 0 or self.used_tokens + tokens <= self.kv_tokens

    def take(self, tokens: int) -> Callable[[], None]:
        """Reserve a slot and ``tokens``. Return a function that frees both."""
        self.used += 1
        self.used_tokens += tokens

        def release() -> None:
            self.used -= 1
            self.used_tokens -= tokens

        return release


def job_slots(slots: int) -> int:
    """Return how many slots jobs may use. If there are two or more, one is reserved for requests."""
    return max(1, slots - 1)
