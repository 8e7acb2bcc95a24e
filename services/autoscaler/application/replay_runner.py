"""Replays on request: what is known of a Deployment goes to a process of its own, whose answer comes back."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson

from services.autoscaler.adapters.history.recordings import MINUTES_KEPT_S, Recordings
from services.autoscaler.application.operations import Operations
from services.autoscaler.domain.desired_state import index_of
from services.autoscaler.domain.replay.fleet import ReplicaTiming
from services.autoscaler.domain.snapshot import Policy
from services.autoscaler.settings import ROOT
from tidegate.kernel.errors import BY_REASON, BadRequest, DeadlinePassed, TidegateError, Unavailable
from tidegate.kernel.protocol.models import Deployment

TIME_LIMIT_S = 240.0


@dataclass(frozen=True, slots=True)
class ReplayRunner:
    """One at a time; each is killed when it takes too long."""

    operations: Operations
    history: Recordings
    policy: Policy
    period_s: float
    cache: Path
    turn: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))

    async def run(self, name: str, order: dict[str, Any]) -> dict[str, Any]:
        """Replay arrivals under the policy of a Deployment and others; ``api/replay.py`` has the order."""
        wanted = self.operations.wanted(name)
        current = self.operations.parts.source.current
        version = index_of(current).version_of(wanted)
        if version is None:
            raise BadRequest(f"The registry lists no version {wanted.version} of model {wanted.model}.")
        arrivals, start_at = await self._arrivals(name, order["arrivals"])
        document = {
            **order,
            "deployment": wanted.model_dump(mode="json"),
            "version": version.model_dump(mode="json"),
            "policy": asdict(self.policy),
            "period_s": max(self.period_s, 0.5),
            "arrivals": arrivals,
            "start_at": order["start_at"] or start_at,
            "service": asdict(await self._service(wanted, order["service"])),
            "history": await self._before(name, arrivals),
        }
        return await self._ask(document)

    async def verify(self, since: float, until: float, deployment: str | None) -> dict[str, Any]:
        """Decide what was recorded again, and compare with what was decided then."""
        await self.operations.parts.recorder.flush(time.time())
        order = {"path": str(self.history.path), "since": since, "until": until, "deployment": deployment}
        return await self._ask({"verify": order})

    async def _arrivals(self, name: str, order: dict[str, Any]) -> tuple[dict[str, Any], float]:
        if order["kind"] != "recorded":
            return order, time.time() // 86_400 * 86_400
        until = int(order["until"] or time.time())
        since = int(order["since"] or until - order["seconds"])
        await self.operations.parts.recorder.flush(time.time())
        counts = await asyncio.to_thread(self.history.by_second, name, since, until)
        found = {str(second): count for second, count in counts.items()}
        return {"kind": "recorded", "by_second": found, "since": since, "seconds": until - since}, since

    async def _before(self, name: str, arrivals: dict[str, Any]) -> dict[str, int]:
        """Arrivals by minute before recorded ones, which forecasts are made from."""
        if arrivals["kind"] != "recorded":
            return {}
        until = arrivals["since"]
        found = await asyncio.to_thread(self.history.by_minute, name, until - MINUTES_KEPT_S, until)
        return {str(minute): count for minute, count in found.items()}

    async def _service(self, wanted: Deployment, given: dict[str, Any]) -> ReplicaTiming:
        """What a replica is like: as it was measured, unless it is given."""
        status = await self.operations.status(wanted.name)
        calls = [r["call_ms"] for r in status.replicas if r.get("call_ms")]
        batches = [r["batch_mean"] for r in status.replicas if r.get("batch_mean")]
        known: dict[str, Any] = {}
        if calls:
            known["call_ms"] = sum(calls) / len(calls) / wanted.instances
            known["batch"] = max(1, round(sum(batches) / len(batches))) if batches else 1
        elif status.service_rate:
            known["call_ms"] = 1000.0 / status.service_rate
        if status.start_s:
            known["start_s"] = status.start_s
        known |= {key: value for key, value in given.items() if value is not None}
        if "call_ms" not in known:
            raise BadRequest(
                f"Nothing was measured of {wanted.name} yet: say how long a call takes (service.call_ms)."
            )
        return ReplicaTiming(**known)

    async def _ask(self, document: dict[str, Any]) -> dict[str, Any]:
        async with self.turn:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "services.autoscaler.replay_process"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env={"PYTHONPATH": str(ROOT), "PATH": os.defpath, "MPLCONFIGDIR": str(self.cache)},
            )
            try:
                async with asyncio.timeout(TIME_LIMIT_S):
                    out, said = await process.communicate(orjson.dumps(document))
            except TimeoutError:
                raise DeadlinePassed(f"The replay took more than {TIME_LIMIT_S:g} s: ask for less.") from None
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
        return _answer(process.returncode, out, said)


def _answer(code: int | None, out: bytes, said: bytes) -> dict[str, Any]:
    if code != 0:
        last = said.decode(errors="replace").strip().splitlines()[-1:] or ["no word"]
        raise Unavailable(f"The replay failed (exit code {code}): {last[0]}")
    told: dict[str, Any] = orjson.loads(out)
    if "error" in told:
        kind: type[TidegateError] = BY_REASON.get(told["error"]["reason"], BadRequest)
        raise kind(told["error"]["message"])
    result: dict[str, Any] = told["result"]
    return result
