"""The stream of accepted feedback, in the store of jobs: gateways write it, each reader has its own position.

tidegate:feedback:stream               the last records, oldest first; the field ``r`` is a FeedbackRecord
tidegate:feedback:seen:<hour>:<part>   set of hashes: which outcomes of the answers of this hour are counted

A reader stores its position beside the results of its reading, in one write. So it counts each record once,
also after a crash. The stream is bounded. :meth:`FeedbackStore.lost` shows if a reader was too slow.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from redis.asyncio import Redis

from tidegate.kernel import telemetry
from tidegate.kernel.protocol.feedback import FeedbackRecord
from tidegate.kernel.store.connection import Connected, answer

log = telemetry.logger(__name__)

PREFIX = "tidegate:feedback:"
STREAM, SEEN = f"{PREFIX}stream", f"{PREFIX}seen:"
START = "0-0"
# The most records in the stream, about 300 bytes each.
KEPT = 200_000
# Hashes of one hour are divided among this many sets, because small sets of integers are compact.
_PARTS = 256
_HOUR_MS = 3_600_000

# Adds each record unless its hash is known. Returns 1 for an added record, 0 for a repeated one.
_ADD = """
local added = {}
for at = 2, #ARGV, 4 do
  local new = redis.call('SADD', ARGV[at], ARGV[at + 1])
  if new == 1 then
    redis.call('PEXPIREAT', ARGV[at], ARGV[at + 2])
    redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[1], '*', 'r', ARGV[at + 3])
  end
  added[#added + 1] = new
end
return added
"""


class FeedbackStore(Connected):
    """Typed access to the stream. Every failure raises ``StoreUnavailable``."""

    def __init__(self, redis: Redis, kept: int = KEPT) -> None:
        super().__init__(redis)
        self._kept = kept
        self._add: Any = redis.register_script(_ADD)

    async def add(self, records: Sequence[tuple[str, FeedbackRecord]], window_ms: int) -> list[bool]:
        """Add records to the stream. Return False for each that was added before; the first value stays.

        Each record comes with the id of its answer. ``window_ms``: how long after an answer its feedback is
        accepted. When the call returns, the records are on disk.
        """
        if not records:
            return []
        arguments: list[bytes | str | int] = [self._kept]
        for id_, record in records:
            hour = record.answered_at // _HOUR_MS
            digest = hashlib.sha256(f"{id_}\0{record.metric}".encode()).digest()
            number = int.from_bytes(digest[:8], "big", signed=True)
            expires = (hour + 1) * _HOUR_MS + window_ms
            arguments += (f"{SEEN}{hour}:{digest[8] % _PARTS}", number, expires, record.to_json())
        found = await answer(self._add(keys=[STREAM], args=arguments))
        return [bool(each) for each in found]

    async def read(self, after: str, count: int = 1000) -> list[tuple[str, FeedbackRecord]]:
        """Return the next records after a position, each with its own position. Begin with ``START``."""
        entries = await answer(self._redis.xrange(STREAM, min=f"({after}", count=count))
        found = []
        for position, fields in entries:
            try:
                found.append((position.decode(), FeedbackRecord.from_json(fields[b"r"])))
            except (ValueError, KeyError, TypeError) as error:
                log.warning("a feedback record cannot be read", extra={"problem": repr(error)})
        return found

    async def lost(self, after: str) -> bool:
        """Return True if records after this position were removed before they were read."""
        first = await answer(self._redis.xrange(STREAM, count=1))
        return bool(first) and after != START and _parts(after) < _parts(first[0][0].decode())

    async def end(self) -> str:
        """Return the position of the newest record; ``START`` if there is none."""
        last = await answer(self._redis.xrevrange(STREAM, count=1))
        return last[0][0].decode() if last else START


def _parts(position: str) -> tuple[int, int]:
    head, _, tail = position.partition("-")
    return int(head), int(tail)
