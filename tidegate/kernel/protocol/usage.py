"""Usage reports from the gateways to the registry: the usage of each endpoint by each principal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any, NamedTuple

import orjson

COUNTS = ("requests", "failed", "compute_us", "received_bytes", "sent_bytes", "tokens_in", "tokens_out")
ZERO = (0,) * len(COUNTS)

# The names of token counts in the parameters of a model's answer.
TOKENS_IN = ("prompt_tokens", "input_tokens", "tokens_in")
TOKENS_OUT = ("completion_tokens", "output_tokens", "tokens_out")
TOKEN_COUNTS = (*TOKENS_IN, *TOKENS_OUT, "total_tokens")
# At most this many tokens are counted for one request. A model may report any number. Sums of larger numbers
# would not fit into the database.
MOST_TOKENS = 2**31 - 1


class Subject(NamedTuple):
    """The key of a count: a day (UTC), a principal and an endpoint."""

    day: date
    principal: str
    endpoint: str


@dataclass(frozen=True, slots=True)
class UsageReport:
    """The counts of a gateway process since its previous report.

    ``(incarnation, seq)`` identifies the report. The registry ignores a report that it has received before.
    Each value of ``counts`` is a tuple in the order of ``COUNTS``.
    """

    incarnation: str
    seq: int
    counts: dict[Subject, tuple[int, ...]]

    def to_json(self) -> bytes:
        """Return the report as a message."""
        items = [[*subject, *counts] for subject, counts in self.counts.items()]
        return orjson.dumps({"v": 1, "incarnation": self.incarnation, "seq": self.seq, "items": items})

    @classmethod
    def from_json(cls, raw: bytes) -> UsageReport:
        """Read a report from a message.

        Raises ValueError, KeyError or TypeError if the message is not a report.
        """
        document = orjson.loads(raw)
        if document["v"] != 1:
            raise ValueError(f"version {document['v']} of a usage report is not known")
        counts = {}
        for day, principal, endpoint, *numbers in document["items"]:
            if len(numbers) != len(COUNTS):
                raise ValueError(f"{len(numbers)} counts, expected {len(COUNTS)}")
            counts[Subject(date.fromisoformat(day), str(principal), str(endpoint))] = tuple(map(int, numbers))
        return cls(str(document["incarnation"]), int(document["seq"]), counts)


def tokens(parameters: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many tokens the model read and wrote; 0 if it does not report a number."""
    return (_count(parameters, TOKENS_IN), _count(parameters, TOKENS_OUT)) if parameters else (0, 0)


def is_count(value: object) -> bool:
    """Return True if a parameter's value can be a number of tokens, which is a positive integer."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _count(parameters: Mapping[str, Any], names: tuple[str, ...]) -> int:
    found: int = next((parameters[name] for name in names if is_count(parameters.get(name))), 0)
    return min(found, MOST_TOKENS)


def added(counts: Iterable[int], more: Iterable[int]) -> tuple[int, ...]:
    """Return the sum of two tuples, element by element."""
    return tuple(a + b for a, b in zip(counts, more, strict=True))


def day_of(epoch_s: float) -> date:
    """Return the calendar day (UTC) of a time in seconds since the epoch."""
    return datetime.fromtimestamp(epoch_s, UTC).date()
