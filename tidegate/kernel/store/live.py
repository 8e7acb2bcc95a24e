"""The live facts in Valkey or Redis: their keys, and the service that writes each of them.

The store can lose facts at any moment. Each writer repeats its writes, so lost facts return within seconds. A
reader must treat a missing fact as unknown, and not as zero.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any

import orjson
from redis.exceptions import RedisError

from tidegate.kernel.protocol.cost_facts import CostFacts
from tidegate.kernel.protocol.presence import GatewayReport, GatewayView, ModelMetadata, ReplicaReport
from tidegate.kernel.protocol.replica_time import ReplicaTime
from tidegate.kernel.protocol.statistics import LAST_INFERENCE
from tidegate.kernel.protocol.traffic import TrafficReport
from tidegate.kernel.store.connection import Connected, answer

# A constant that ends with ":" is the beginning of a key. A comment such as "+ replica" names the rest.
ROUTES = "tidegate:routes"  # the route table, written by the router
ROUTES_CHANGED = "tidegate:routes:changed"  # channel on which the router announces a new route table
REPLICA = "tidegate:replica:"  # + replica: the worker's heartbeat, written by the worker
GATEWAY = "tidegate:gateway:"  # + incarnation: the gateway's heartbeat, written by the gateway
GATEWAYS = "tidegate:gateways"  # sorted set of incarnations by time of last heartbeat, written by gateways
TIME = "tidegate:time:"  # + replica: how the replica has spent its time (ReplicaTime), written by the worker
COSTS = "tidegate:costs"  # the cost rates of Deployments (CostFacts), written by the autoscaler
STATUSES = "tidegate:statuses"  # DeploymentStatus by Deployment name, written by the autoscaler
MODEL = "tidegate:model:"  # + deployment: ModelMetadata, written by the Deployment's workers every 10 s
CLAIM = "tidegate:claim:"  # + replica: the worker that becomes this replica; only the first write counts
OFFER = "tidegate:offer:"  # + scratch replica: the Assignment that the autoscaler offers to this replica
TRAFFIC = "tidegate:traffic:"  # + incarnation: totals per endpoint (TrafficReport), written by the gateway
CALLERS = "tidegate:callers:"  # + 10 s interval + endpoint: HyperLogLog of callers, written by gateways
CALLERS_OF_DAY = "tidegate:callers-day:"  # + day + endpoint: HyperLogLog of callers, written by the router
STATISTICS = "tidegate:statistics:"  # + deployment: hash of counts; the Deployment's workers add to them

REPLICA_TTL_MS = 6_000
FAILED_TTL_MS = 120_000
GATEWAY_TTL_MS = 3_000
# Metadata and counts expire this many seconds after the last write. Until then, they are shown even if the
# Deployment has no replicas.
MODEL_TTL_S = STATISTICS_TTL_S = 30 * 86_400
CLAIM_TTL_S = 3600
# A replica's last ``ReplicaTime`` is kept for this many seconds, so that a restarted autoscaler can read it.
TIME_TTL_S = 6 * 3600
# The last totals of a gateway are kept for this many seconds after it stops, so that the router can read
# them.
TRAFFIC_TTL_S = 60
CALLERS_SLOT_S = 10
CALLERS_TTL_S = 120
CALLERS_DAY_TTL_S = 3 * 86_400
# A gateway without a heartbeat is listed as missing for this many seconds. Then it is removed from the list.
GATEWAY_GONE_S = 30.0

# This script replaces the stored route table and returns false. If the stored table has a greater revision,
# the script keeps it and returns its epoch instead. The revision is at the start of a table, so the script
# reads only the start of the stored table. A stored table without a revision is always replaced.
PUBLISH_ROUTES = """
local function revision(head)
  return string.match(head, '^{"epoch":"(%d+)","n":(%d+)')
end
local epoch, n = revision(string.sub(ARGV[1], 1, 80))
local held, held_n = revision(redis.call('GETRANGE', KEYS[1], 0, 79))
if epoch and held and (held > epoch or (held == epoch and tonumber(held_n) > tonumber(n))) then
  return held
end
redis.call('SET', KEYS[1], ARGV[1])
redis.call('PUBLISH', KEYS[2], '')
return false
"""


class Store(Connected):
    """Typed access to the live facts. Every failure raises ``StoreUnavailable``."""

    async def ping(self) -> None:
        """Wait until the store answers."""
        await answer(self._redis.ping())

    async def publish_routes(self, table: bytes) -> int | None:
        """Replace the route table, notify its watchers, and return None.

        If the stored table has a greater revision, keep the stored table and return its epoch instead.
        """
        newer = await answer(self._redis.eval(PUBLISH_ROUTES, 2, ROUTES, ROUTES_CHANGED, table))
        return None if newer is None else int(newer)

    async def read_routes(self) -> bytes | None:
        """Return the route table; None if the store has none."""
        value: bytes | None = await answer(self._redis.get(ROUTES))
        return value

    async def watch_routes(self) -> AsyncIterator[None]:
        """Yield after each change of the route table. Raises ``StoreUnavailable`` if the connection ends."""
        pubsub = self._redis.pubsub(ignore_subscribe_messages=True)
        try:
            await answer(pubsub.subscribe(ROUTES_CHANGED))
            while True:
                if await answer(pubsub.get_message(timeout=1.0)) is not None:
                    yield
        finally:
            with contextlib.suppress(RedisError, OSError):
                await pubsub.aclose()  # type: ignore[no-untyped-call]

    async def report_replica(self, report: ReplicaReport) -> None:
        """Write a worker's heartbeat.

        A failed worker's heartbeat expires later, so that the autoscaler can read why the worker failed.
        """
        ttl = FAILED_TTL_MS if report.state == "failed" else REPLICA_TTL_MS
        await answer(self._redis.set(REPLICA + report.replica, report.to_json(), px=ttl))

    async def forget_replica(self, replica: str) -> None:
        """Remove the heartbeat of a worker that stops normally."""
        await answer(self._redis.delete(REPLICA + replica))

    async def report_time(self, report: ReplicaTime) -> None:
        """Write how a replica has spent its time."""
        await answer(self._redis.set(TIME + report.replica, report.to_json(), ex=TIME_TTL_S))

    async def times(self) -> dict[str, ReplicaTime]:
        """Return the last report of how each replica has spent its time. Include replicas that have ended."""
        reports = [ReplicaTime.from_json(raw) for raw in await self._scan(TIME)]
        return {report.replica: report for report in reports}

    async def forget_times(self, replicas: Sequence[str]) -> None:
        """Delete the time reports of these replicas.

        The calling code must call this only after the cost ledger has recorded the reported times.
        """
        if replicas:
            await answer(self._redis.delete(*(TIME + replica for replica in replicas)))

    async def publish_cost_facts(self, facts: CostFacts) -> None:
        """Replace the cost rates of all Deployments."""
        await answer(self._redis.set(COSTS, facts.to_json()))

    async def cost_facts(self) -> CostFacts | None:
        """Return the cost rates of Deployments; None if none were written."""
        raw = await answer(self._redis.get(COSTS))
        return CostFacts.from_json(raw) if raw is not None else None

    async def claim_replica(self, replica: str, by: str) -> str:
        """Record that the worker ``by`` becomes ``replica``, unless another worker is recorded already.

        Return the recorded worker.
        """
        key = CLAIM + replica
        await answer(self._redis.set(key, by, nx=True, ex=CLAIM_TTL_S))
        return await self.claimant(replica) or by

    async def claimant(self, replica: str) -> str | None:
        """Return the worker that is recorded to become ``replica``, or None."""
        raw = await answer(self._redis.get(CLAIM + replica))
        return raw.decode() if raw is not None else None

    async def offer_replica(self, worker: str, assignment: str, lives_s: float) -> None:
        """Offer an assignment to the scratch replica ``worker``.

        The offer expires after ``lives_s`` seconds.
        """
        await answer(self._redis.set(OFFER + worker, assignment, px=int(lives_s * 1000)))

    async def offered(self, worker: str) -> bytes | None:
        """Return the assignment that is offered to a scratch replica, or None."""
        raw: bytes | None = await answer(self._redis.get(OFFER + worker))
        return raw

    async def replicas(self) -> list[ReplicaReport]:
        """Return the heartbeats of all workers."""
        return [ReplicaReport.from_json(raw) for raw in await self._scan(REPLICA)]

    async def report_gateway(self, report: GatewayReport) -> None:
        """Write a gateway's heartbeat, and add the gateway to the list of known gateways."""
        # Serialize before the first await, because the gateway changes the report's counts meanwhile.
        heartbeat = report.to_json()
        now = await self._now()
        pipe = self._redis.pipeline(transaction=False)
        pipe.set(GATEWAY + report.incarnation, heartbeat, px=GATEWAY_TTL_MS)
        pipe.zadd(GATEWAYS, {report.incarnation: now})
        await answer(pipe.execute())

    async def forget_gateway(self, incarnation: str) -> None:
        """Remove a gateway that stops normally, so that it is not listed as missing."""
        pipe = self._redis.pipeline(transaction=False)
        pipe.delete(GATEWAY + incarnation)
        pipe.zrem(GATEWAYS, incarnation)
        await answer(pipe.execute())

    async def gateways(self) -> GatewayView:
        """Return the heartbeats of all gateways, and the names of gateways whose heartbeat is missing."""
        now = await self._now()
        await answer(self._redis.zremrangebyscore(GATEWAYS, "-inf", now - GATEWAY_GONE_S))
        known = {name.decode() for name in await answer(self._redis.zrange(GATEWAYS, 0, -1))}
        reports = [GatewayReport.from_json(raw) for raw in await self._scan(GATEWAY)]
        return GatewayView(reports, sorted(known - {report.incarnation for report in reports}))

    async def report_traffic(self, report: TrafficReport, callers: Mapping[str, Iterable[str]]) -> None:
        """Write a gateway's totals, and add its recent callers to the counts of distinct callers.

        ``callers``: the names of the recent callers of each endpoint.
        """
        pipe = self._redis.pipeline(transaction=False)
        pipe.set(TRAFFIC + report.incarnation, report.to_json(), ex=TRAFFIC_TTL_S)
        slot = int(report.at // CALLERS_SLOT_S)
        for endpoint, names in callers.items():
            key = f"{CALLERS}{slot}:{endpoint}"
            pipe.pfadd(key, *names)
            pipe.expire(key, CALLERS_TTL_S)
        await answer(pipe.execute())

    async def traffic(self) -> list[TrafficReport]:
        """Return the totals of all gateways, including those that stopped in the last minute."""
        return [TrafficReport.from_json(raw) for raw in await self._scan(TRAFFIC)]

    async def count_callers(self, endpoints: Sequence[str], day_s: float, now: float) -> dict[str, int]:
        """Return the number of distinct callers of each endpoint, on the day of ``now``.

        Before counting, add the callers of the last minute to those of the day. ``day_s``: the length of a
        day in seconds.
        """
        if not endpoints:
            return {}
        day = int(now // day_s)
        last = int(now // CALLERS_SLOT_S)
        first = max(last - 6, math.ceil(day * day_s / CALLERS_SLOT_S))
        pipe = self._redis.pipeline(transaction=False)
        for endpoint in endpoints:
            key = f"{CALLERS_OF_DAY}{day}:{endpoint}"
            slots = [f"{CALLERS}{slot}:{endpoint}" for slot in range(first, last + 1)]
            pipe.pfmerge(key, *slots)
            pipe.expire(key, CALLERS_DAY_TTL_S)
            pipe.pfcount(key)
        found = await answer(pipe.execute())
        return dict(zip(endpoints, map(int, found[2::3]), strict=True))

    async def publish_statuses(self, statuses: dict[str, dict[str, Any]]) -> None:
        """Replace the statuses of all Deployments."""
        await answer(self._redis.set(STATUSES, orjson.dumps(statuses), px=60_000))

    async def statuses(self) -> dict[str, dict[str, Any]]:
        """Return the last statuses of all Deployments; empty if none were published recently."""
        raw = await answer(self._redis.get(STATUSES))
        found: dict[str, dict[str, Any]] = orjson.loads(raw) if raw else {}
        return found

    async def publish_model(self, deployment: str, metadata: ModelMetadata) -> None:
        """Write the metadata of a Deployment's model."""
        await answer(self._redis.set(MODEL + deployment, metadata.to_json(), ex=MODEL_TTL_S))

    async def models(self, deployments: Sequence[str]) -> dict[str, ModelMetadata]:
        """Return the metadata of these Deployments' models. Leave out Deployments without metadata."""
        if not deployments:
            return {}
        found = await answer(self._redis.mget([MODEL + name for name in deployments]))
        pairs = zip(deployments, found, strict=True)
        return {name: ModelMetadata.from_json(raw) for name, raw in pairs if raw is not None}

    async def add_statistics(self, deployment: str, counts: Mapping[str, int], last_ms: int) -> None:
        """Add ``counts`` to the stored counts of a Deployment.

        ``last_ms``: when the model last ran, in milliseconds since the epoch; 0 if it has not run.
        """
        pipe = self._redis.pipeline()
        for name, count in counts.items():
            pipe.hincrby(STATISTICS + deployment, name, count)
        if last_ms:
            pipe.hset(STATISTICS + deployment, LAST_INFERENCE, last_ms)
        pipe.expire(STATISTICS + deployment, STATISTICS_TTL_S)
        await answer(pipe.execute())

    async def statistics(self, deployments: Sequence[str]) -> dict[str, dict[str, int]]:
        """Return the counts of these Deployments; empty for a Deployment without counts."""
        pipe = self._redis.pipeline(transaction=False)
        for name in deployments:
            pipe.hgetall(STATISTICS + name)
        found = await answer(pipe.execute()) if deployments else []
        return {
            name: {key.decode(): int(value) for key, value in counts.items()}
            for name, counts in zip(deployments, found, strict=True)
        }

    async def _now(self) -> float:
        # Use the store's clock for all gateways, because the clocks of their machines can differ.
        seconds, micros = await answer(self._redis.time())
        return float(seconds) + float(micros) / 1e6

    async def _scan(self, prefix: str) -> list[bytes]:
        keys = await answer(self._keys(prefix))
        values = await answer(self._redis.mget(keys)) if keys else []
        return [value for value in values if value is not None]

    async def _keys(self, prefix: str) -> list[Any]:
        return [key async for key in self._redis.scan_iter(match=f"{prefix}*", count=1000)]
