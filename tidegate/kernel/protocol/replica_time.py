"""The report of a replica's time, in whole nanoseconds, so that the sum of the parts is exact.

    time of a replica = answered calls (by caller, endpoint) + start + idle + wasted calls + calls in flight

A worker writes this report every second, or less often if the report has many parts. All numbers are totals
since the replica's launch. So if a report is lost, the next one has its numbers too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import orjson
from typing_extensions import Self

BUSY, STARTING, IDLE, WASTED = "busy", "starting", "idle", "wasted"

_OF_CALLS = frozenset({BUSY, WASTED})

# Why the time of a call was wasted. ``retried``: the call failed, and its requests run again in another call.
# ``expired``, ``cancelled``: the caller stopped waiting before the answer. ``failed``: the caller got an
# error. ``lost``: the model or the worker died during the call.
WASTES = ("retried", "expired", "cancelled", "failed", "lost")


class Spent(NamedTuple):
    """An amount of a replica's time in ns, and the numbers of requests, rows and tokens that used it."""

    ns: int = 0
    requests: int = 0
    rows: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    tokens_cached: int = 0

    def plus(self, other: Spent) -> Spent:
        """Return the sum of two values, field by field."""
        return Spent(*(mine + more for mine, more in zip(self, other, strict=True)))

    def minus(self, other: Spent) -> Spent:
        """Return the difference of two values, field by field."""
        return Spent(*(mine - less for mine, less in zip(self, other, strict=True)))


class Part(NamedTuple):
    """A use of a replica's time. It is a key of ``ReplicaTime.parts``.

    ``kind``: in a worker's report, ``busy``, ``starting``, ``idle`` or ``wasted``. The autoscaler adds other
    kinds. ``detail``: the reason why time was wasted. ``caller``, ``endpoint``: only for busy time.
    """

    kind: str
    detail: str = ""
    caller: str = ""
    endpoint: str = ""


@dataclass(frozen=True, slots=True)
class ReplicaTime:
    """The report of a replica's time.

    ``open_ns``: the time of the calls in flight. ``ended``: True in the replica's last report.
    ``calls_ns``: the sum of the durations of all calls. It exceeds ``covered_ns`` if calls run at the
      same time.
    """

    replica: str
    deployment: str
    open_ns: int = 0
    ended: bool = False
    parts: Mapping[Part, Spent] = field(default_factory=dict)
    calls_ns: int = 0

    @property
    def covered_ns(self) -> int:
        """Return the time during which at least one call was in flight.

        Time with several calls counts once.
        """
        return self.open_ns + sum(spent.ns for part, spent in self.parts.items() if part.kind in _OF_CALLS)

    @property
    def total_ns(self) -> int:
        """Return the whole time of the replica, up to this report."""
        return self.open_ns + sum(spent.ns for spent in self.parts.values())

    def to_json(self) -> bytes:
        """Return the report as JSON."""
        document = asdict(self) | {"parts": [[*part, *spent] for part, spent in self.parts.items()]}
        return orjson.dumps(document)

    @classmethod
    def from_json(cls, raw: bytes) -> Self:
        """Read a report. Unknown members and counts of a newer writer are ignored."""
        document = orjson.loads(raw)
        known = {name: value for name, value in document.items() if name in cls.__dataclass_fields__}
        places, counts = len(Part._fields), len(Spent._fields)
        parts = {
            Part(*row[:places]): Spent(*map(int, row[places : places + counts])) for row in known["parts"]
        }
        return cls(**(known | {"parts": parts}))
