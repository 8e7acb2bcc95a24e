"""Choose the next request to a language model, and count the used engine slots and KV tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from tidegate.kernel.protocol.llm import BAND_WEIGHTS, Band


class Source(NamedTuple):
    """A queue of a band: the queue that all replicas share, or the replica's own queue."""

    band: Band
    own: bool


class BandTurns:
    """The order in which bands get engine slots. If all bands have requests, weights decide.

    This is start-time fair queueing. The next band is the one with the fewest served requests per weight.
    While a band has no request, it saves up at most one turn. Within a band, turns alternate between the
    replica's own queue and the shared queue. So neither queue starves.
    """

    def __init__(self, weights: Mapping[Band, int] = BAND_WEIGHTS) -> None:
        self._weights = weights
        self._served: dict[Band, float] = dict.fromkeys(weights, 0.0)
        self._own_next: dict[Band, bool] = dict.fromkeys(weights, True)

    def order(self) -> Iterator[Source]:
        """Yield all queues. The next request comes from the first of them that is not empty."""
        for band in sorted(self._served, key=lambda band: self._served[band]):
            own = self._own_next[band]
            yield Source(band, own)
            yield Source(band, not own)

    def served(self, source: Source) -> None:
        """Count a request that was taken from ``source``.

        Call this only if all queues before ``source`` in :meth:`order` were empty.
        """
        clock = self._served[source.band]
        self._own_next[source.band] = not source.own
        for band, served in self._served.items():
            if served < clock:  # the band was empty: limit its unused turns to one
                self._served[band] = max(served, clock - 1 / self._weights[band])
        self._served[source.band] += 1 / self._weights[source.band]


class LlmRoom:
    """The counts of an engine's used slots and used KV cache tokens.

    If ``kv_tokens`` is None, tokens are not limited.
    """

    def __init__(self, slots: int, kv_tokens: int | None) -> None:
        self.slots = slots
        self.kv_tokens = kv_tokens
        self.used = 0
        self.used_tokens = 0

    def fits(self, tokens: int, *, others: int = 0) -> bool:
        """Return True if one more request with this many tokens may start now.

        ``others``: the number of engine slots that jobs use.

        If the engine runs no other request, a request may start even if it is larger than the whole KV cache.
        Then the engine accepts or refuses it.
        """
        if self.used + others >= self.slots:
            return False
        return self.kv_tokens is None or self.used == 0 or self.used_tokens + tokens <= self.kv_tokens

    def take(self, tokens: int) -> Callable[[], None]:
        """Reserve an engine slot and ``tokens`` KV cache tokens. Return a function that releases them."""
        self.used += 1
        self.used_tokens += tokens

        def release() -> None:
            self.used -= 1
            self.used_tokens -= tokens

        return release


def job_slots(slots: int) -> int:
    """Return the number of engine slots that jobs may use.

    If the engine has two or more slots, one is reserved for requests.
    """
    return max(1, slots - 1)
