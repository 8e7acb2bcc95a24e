"""The stream of accepted feedback in the store of jobs.

Gateways write the stream. Each reader has its own position in it.

    tidegate:feedback:stream               the last records; the field ``r`` is a FeedbackRecord
    tidegate:feedback:seen:<hour>:<part>   set: for each stored record, the digest of its answer and metric
    tidegate:feedback:names:<hour>:<part>  Redis hash: for each answer, how many unusual metrics it has

A reader stores its position together with its results, in one write. So it counts each record once, even if
it crashes. The length of the stream is limited, so a slow reader can miss records. :meth:`FeedbackStore.lost`
tells a reader if it may have missed some.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

from redis.asyncio import Redis

from tidegate.kernel import telemetry
from tidegate.kernel.protocol.feedback import FeedbackRecord
from tidegate.kernel.store.connection import Connected, answer

log = telemetry.logger(__name__)

PREFIX = "tidegate:feedback:"
STREAM, SEEN, NAMES = f"{PREFIX}stream", f"{PREFIX}seen:", f"{PREFIX}names:"
START = "0-0"
# The stream keeps about this many records. Each has about 300 bytes.
KEPT = 200_000
# The digests of one hour are divided among this many sets, because small sets of integers need less memory.
_PARTS = 256
_HOUR_MS = 3_600_000

# The usual metrics, which are always accepted. The number of other metrics of an answer is limited, so that
# callers cannot fill the store with names.
_USUAL = {"score", "reward", "label"}
MOST_NAMES = 16

# This script adds records to the stream. For each record it returns 1 (added), 0 (repeated: the sets already
# contain its digest), or -1 (its answer has too many unusual metrics).
_ADD = """
local added = {}
for at = 3, #ARGV, 6 do
  local names, answer = ARGV[at + 3], ARGV[at + 4]
  local new = 0
  if redis.call('SISMEMBER', ARGV[at], ARGV[at + 1]) == 0 then
    new = 1
    if names ~= '' then
      if tonumber(redis.call('HGET', names, answer) or '0') >= tonumber(ARGV[2]) then
        new = -1
      else
        redis.call('HINCRBY', names, answer, 1)
        redis.call('PEXPIREAT', names, ARGV[at + 2])
      end
    end
  end
  if new == 1 then
    redis.call('SADD', ARGV[at], ARGV[at + 1])
    redis.call('PEXPIREAT', ARGV[at], ARGV[at + 2])
    redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[1], '*', 'r', ARGV[at + 5])
  end
  added[#added + 1] = new
end
return added
"""
Added = Literal["added", "repeated", "too_many"]
_ADDED: dict[int, Added] = {1: "added", 0: "repeated", -1: "too_many"}


class FeedbackStore(Connected):
    """Typed access to the stream of feedback. Every failure raises ``StoreUnavailable``."""

    def __init__(self, redis: Redis, kept: int = KEPT) -> None:
        super().__init__(redis)
        self._kept = kept
        self._add: Any = redis.register_script(_ADD)

    async def add(self, records: Sequence[tuple[str, FeedbackRecord]], window_ms: int) -> list[Added]:
        """Add records to the stream. Return when the records are on disk.

        ``records``: pairs of an answer's id and a record of this answer. ``window_ms``: feedback is accepted
        for this many milliseconds after its answer.

        Return one of these for each record:
        - ``added``: the record is new.
        - ``repeated``: the answer already has a record of this metric, and keeps that first record.
        - ``too_many``: the metric is not a usual one, and the answer has ``MOST_NAMES`` such metrics already.
        """
        if not records:
            return []
        arguments: list[bytes | str | int] = [self._kept, MOST_NAMES]
        for id_, record in records:
            hour = record.answered_at // _HOUR_MS
            number, part = _hashed(f"{id_}\0{record.metric}")
            of_answer, its_part = _hashed(id_)
            names = "" if record.metric in _USUAL else f"{NAMES}{hour}:{its_part}"
            expires = (hour + 1) * _HOUR_MS + window_ms
            arguments += (f"{SEEN}{hour}:{part}", number, expires, names, of_answer, record.to_json())
        found = await answer(self._add(keys=[STREAM], args=arguments))
        return [_ADDED[each] for each in found]

    async def read(self, after: str, count: int = 1000) -> list[tuple[str, FeedbackRecord]]:
        """Return up to ``count`` records after a position, each with its own position.

        ``START`` is the position before the first record.
        """
        entries = await answer(self._redis.xrange(STREAM, min=f"({after}", count=count))
        found = []
        for position, fields in entries:
            try:
                found.append((position.decode(), FeedbackRecord.from_json(fields[b"r"])))
            except (ValueError, KeyError, TypeError) as error:
                log.warning("a feedback record cannot be read", extra={"problem": repr(error)})
        return found

    async def lost(self, after: str) -> bool:
        """Return True if records after this position may have been removed before they were read."""
        first = await answer(self._redis.xrange(STREAM, count=1))
        return bool(first) and after != START and _parts(after) < _parts(first[0][0].decode())

    async def end(self) -> str:
        """Return the position of the newest record; ``START`` for an empty stream."""
        last = await answer(self._redis.xrevrange(STREAM, count=1))
        return last[0][0].decode() if last else START


def _parts(position: str) -> tuple[int, int]:
    head, _, tail = position.partition("-")
    return int(head), int(tail)


def _hashed(text: str) -> tuple[int, int]:
    """Return the digest of a text, and the number of the set to which the digest belongs.

    The digest is a signed integer of 64 bits.
    """
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True), digest[8] % _PARTS
