"""The replica of each sequence, in the live store, so that all gateways agree.

tidegate:sequence:<key>       the place: Deployment, replica and token; it expires when the sequence is idle
tidegate:sequence:<key>:open  ids of its unanswered requests at all gateways; the score is the deadline (ms)
tidegate:sequences:<replica>  keys of the replica's sequences; the score is the time of expiry (ms)

The token is a random text, which is new for each start of a sequence.

The store may lose these keys. Then a gateway uses the places that it remembers (``application/inference``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from services.gateway.domain.sequences import LOST_KEPT_MS, Place, SequenceSlots, Times
from tidegate.kernel.store.connection import Connected, answer

PLACE = "tidegate:sequence:"
OF_REPLICA = "tidegate:sequences:"
OPEN = ":open"
KEPT_MS = 86_400_000
_PART = "\x1f"
_LOST = "lost"

_NOW = "local t = redis.call('TIME') local now = t[1] * 1000 + math.floor(t[2] / 1000)\n"

# Chooses the replica that already has the sequence, else the replica with room for the most new sequences.
# Writes the place of the sequence. Returns the chosen replica's position in the list (from 1), or 0 if all
# are full.
_START = f"""{_NOW}
local member, value, request = ARGV[1], ARGV[2], ARGV[3]
local busy, ttl = tonumber(ARGV[4]), tonumber(ARGV[4]) + tonumber(ARGV[5])
local best, most, count = 0, 0, #KEYS - 2
for i = 1, count do
  redis.call('ZREMRANGEBYSCORE', KEYS[i + 2], '-inf', now)
  local free = tonumber(ARGV[5 + 2 * i]) - redis.call('ZCARD', KEYS[i + 2])
  if redis.call('ZSCORE', KEYS[i + 2], member) then free = math.huge end
  if free > most then best, most = i, free end
end
if best == 0 then return 0 end
for i = 1, count do
  if i ~= best then redis.call('ZREM', KEYS[i + 2], member) end
end
redis.call('SET', KEYS[1], value .. ARGV[4 + 2 * best], 'PX', ttl)
redis.call('DEL', KEYS[2])
redis.call('ZADD', KEYS[2], now + busy, request)
redis.call('PEXPIRE', KEYS[2], ttl)
redis.call('ZADD', KEYS[best + 2], now + ttl, member)
redis.call('PEXPIRE', KEYS[best + 2], {KEPT_MS})
return best
"""
# Records that a request begins or ends, if the sequence's place is still ARGV[1]. The idle time begins at the
# latest deadline of the sequence's unanswered requests at all gateways. So the sequence cannot expire while
# another gateway waits for an answer.
_KEEP = f"""{_NOW}
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
local busy, idle = tonumber(ARGV[4]), tonumber(ARGV[5])
redis.call('ZREM', KEYS[2], ARGV[3])
if busy > 0 then redis.call('ZADD', KEYS[2], now + busy, ARGV[3]) end
local last = tonumber(redis.call('ZRANGE', KEYS[2], -1, -1, 'WITHSCORES')[2] or now)
local ttl = math.max(0, last - now) + idle
redis.call('PEXPIRE', KEYS[1], ttl)
redis.call('PEXPIRE', KEYS[2], ttl)
redis.call('ZADD', KEYS[3], now + ttl, ARGV[2])
return 1
"""
# Removes a sequence, if its place is still ARGV[1]. If ARGV[3] is given, it becomes the new place, which
# marks the sequence as lost.
_END = f"""
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('ZREM', KEYS[3], ARGV[2])
redis.call('DEL', KEYS[2])
if ARGV[3] then redis.call('SET', KEYS[1], ARGV[3], 'PX', {LOST_KEPT_MS}) else redis.call('DEL', KEYS[1]) end
return 1
"""


class SequencePlaces(Connected):
    """Typed access to the places of sequences. Every failure raises ``StoreUnavailable``."""

    async def find(self, key: str) -> Place | None:
        """Return the place of a sequence; None if it has not started, has ended, or was idle for too long."""
        raw = await answer(self._redis.get(PLACE + key))
        return None if raw is None else _read(raw.decode())

    async def start(
        self,
        key: str,
        deployment: str,
        replicas: Sequence[SequenceSlots],
        token: str,
        request: bytes,
        times: Times,
    ) -> Place | None:
        """Set and return the place of a new sequence; None if no replica can keep another sequence.

        ``request``: the id of the first request. ``times``: how long this request may take, and how long the
        sequence may be idle after it.
        """
        keys = [PLACE + key, PLACE + key + OPEN, *(OF_REPLICA + replica.name for replica in replicas)]
        arguments: list[Any] = [key, f"{token}{_PART}{deployment}{_PART}", request, *times]
        for replica in replicas:
            arguments += [replica.name, replica.slots]
        chosen = int(await answer(self._redis.eval(_START, len(keys), *keys, *arguments)))
        return Place(deployment, replicas[chosen - 1].name, token) if chosen else None

    async def keep(self, key: str, place: Place, request: bytes, times: Times) -> bool:
        """Record that a request of a sequence begins or has ended.

        Return False if the sequence has ended, or has another place now.

        ``times.busy_ms``: how long the request may take; 0 if it has ended. The sequence expires
        ``times.idle_ms`` after the latest deadline of its unanswered requests.
        """
        arguments = (*_keys(key, place), _written(place), key, request, *times)
        return bool(await answer(self._redis.eval(_KEEP, 3, *arguments)))

    async def end(self, key: str, place: Place, *, lost: bool = False) -> bool:
        """Remove a sequence. With ``lost``, remember for a while that the sequence's replica has ended.

        Return False if the sequence has ended already, or has another place now.
        """
        more = [_written(place._replace(lost=True))] if lost else []
        return bool(await answer(self._redis.eval(_END, 3, *_keys(key, place), _written(place), key, *more)))


def _keys(key: str, place: Place) -> tuple[str, str, str]:
    return PLACE + key, PLACE + key + OPEN, OF_REPLICA + place.replica


def _written(place: Place) -> str:
    return _PART.join((_LOST if place.lost else place.token, place.deployment, place.replica))


def _read(raw: str) -> Place:
    token, deployment, replica = raw.split(_PART)
    return Place(deployment, replica, token, token == _LOST)
