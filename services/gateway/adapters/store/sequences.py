"""The replica of each sequence, in the live store, so that all gateways agree.

tidegate:sequence:<key>       the place: Deployment, replica and token; it expires when the sequence is idle
tidegate:sequences:<replica>  keys of the replica's sequences; the score is when they expire (ms)

The store may lose them. Then a gateway uses the places that it remembers (``application/inference``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from services.gateway.domain.sequences import LOST_KEPT_MS, Place, SequenceSlots
from tidegate.kernel.store.connection import Connected, answer

PLACE = "tidegate:sequence:"
OF_REPLICA = "tidegate:sequences:"
KEPT_MS = 86_400_000
_PART = "\x1f"
_LOST = "lost"

_NOW = "local t = redis.call('TIME') local now = t[1] * 1000 + math.floor(t[2] / 1000)\n"

# Chooses the replica with the most free slots, unless one has the sequence already. Sets its place. Returns
# the number of the replica, or 0 if all are full.
_START = f"""{_NOW}
local member, ttl, value = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local best, most, count = 0, 0, #KEYS - 1
for i = 1, count do
  redis.call('ZREMRANGEBYSCORE', KEYS[i + 1], '-inf', now)
  local free = tonumber(ARGV[3 + 2 * i]) - redis.call('ZCARD', KEYS[i + 1])
  if redis.call('ZSCORE', KEYS[i + 1], member) then free = math.huge end
  if free > most then best, most = i, free end
end
if best == 0 then return 0 end
for i = 1, count do
  if i ~= best then redis.call('ZREM', KEYS[i + 1], member) end
end
redis.call('SET', KEYS[1], value .. ARGV[2 + 2 * best], 'PX', ttl)
redis.call('ZADD', KEYS[best + 1], now + ttl, member)
redis.call('PEXPIRE', KEYS[best + 1], {KEPT_MS})
return best
"""
# Moves the end of an idle sequence, if the place is still the same.
_KEEP = f"""{_NOW}
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('ZADD', KEYS[2], now + tonumber(ARGV[3]), ARGV[2])
return 1
"""
# Removes a sequence, if the place is still the same. With a fourth argument, this replaces the place.
_END = f"""
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('ZREM', KEYS[2], ARGV[2])
if ARGV[3] then redis.call('SET', KEYS[1], ARGV[3], 'PX', {LOST_KEPT_MS}) else redis.call('DEL', KEYS[1]) end
return 1
"""


class SequencePlaces(Connected):
    """Typed access to the places of sequences; every failure is a ``StoreUnavailable``."""

    async def find(self, key: str) -> Place | None:
        """Return the place of a sequence; None if it has not started, has ended, or was idle."""
        raw = await answer(self._redis.get(PLACE + key))
        return None if raw is None else _read(raw.decode())

    async def start(
        self, key: str, deployment: str, replicas: Sequence[SequenceSlots], token: str, ttl_ms: int
    ) -> Place | None:
        """Set the place of a new sequence and return it; return None if no replica has a free slot."""
        keys = [PLACE + key, *(OF_REPLICA + replica.name for replica in replicas)]
        arguments: list[Any] = [key, ttl_ms, f"{token}{_PART}{deployment}{_PART}"]
        for replica in replicas:
            arguments += [replica.name, replica.slots]
        chosen = int(await answer(self._redis.eval(_START, len(keys), *keys, *arguments)))
        return Place(deployment, replicas[chosen - 1].name, token) if chosen else None

    async def keep(self, key: str, place: Place, ttl_ms: int) -> None:
        """Let a sequence expire ``ttl_ms`` from now."""
        keys = (PLACE + key, OF_REPLICA + place.replica)
        await answer(self._redis.eval(_KEEP, 2, *keys, _written(place), key, ttl_ms))

    async def end(self, key: str, place: Place, *, lost: bool = False) -> None:
        """Remove a sequence. With ``lost``, remember for a while that its replica has ended."""
        keys = (PLACE + key, OF_REPLICA + place.replica)
        more = [_written(place._replace(lost=True))] if lost else []
        await answer(self._redis.eval(_END, 2, *keys, _written(place), key, *more))


def _written(place: Place) -> str:
    return _PART.join((_LOST if place.lost else place.token, place.deployment, place.replica))


def _read(raw: str) -> Place:
    token, deployment, replica = raw.split(_PART)
    return Place(deployment, replica, token, token == _LOST)
