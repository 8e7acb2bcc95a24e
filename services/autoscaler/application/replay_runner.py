"""Run replays with a Deployment's measured times. Each replay runs in its own process."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Mapping, Sequence
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
    """A runner of replays, one at a time. It kills a replay that takes too long."""

    operations: Operations
    recordings: Recordings
    policy: Policy
    period_s: float
    cache: Path
    turn: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))

    async def run(self, name: str, request: dict[str, Any]) -> dict[str, Any]:
        """Replay arrivals under each policy of ``request``; ``api/replay.py`` defines its fields."""
        deployment = self.operations.deployment(name)
        current = self.operations.parts.source.current
        version = index_of(current).version_of(deployment)
        if version is None:
            raise BadRequest(
                f"The registry lists no version {deployment.version} of model {deployment.model}."
            )
        arrivals, start_at = await self._arrivals(name, request["arrivals"])
        document = {
            **request,
            "deployment": deployment.model_dump(mode="json"),
            "version": version.model_dump(mode="json"),
            "policy": asdict(self.policy),
            "period_s": max(self.period_s, 0.5),
            "arrivals": arrivals,
            "start_at": request["start_at"] or start_at,
            "service": asdict(await self._timing(deployment, request["service"])),
            "history": await self._earlier(name, arrivals),
        }
        return await self._run_process(document)

    async def verify(self, since: float, until: float, deployment: str | None) -> dict[str, Any]:
        """Repeat the decisions of the recorded rounds, and compare them with the recorded decisions."""
        await self.operations.parts.recorder.flush(time.time())
        verify = {"path": str(self.recordings.path), "since": since, "until": until, "deployment": deployment}
        return await self._run_process({"verify": verify})

    async def _arrivals(self, name: str, source: dict[str, Any]) -> tuple[dict[str, Any], float]:
        if source["kind"] != "recorded":
            return source, time.time() // 86_400 * 86_400
        until = int(source["until"] or time.time())
        since = int(source["since"] or until - source["seconds"])
        await self.operations.parts.recorder.flush(time.time())
        counts = await asyncio.to_thread(self.recordings.by_second, name, since, until)
        found = {str(second): count for second, count in counts.items()}
        return {"kind": "recorded", "by_second": found, "since": since, "seconds": until - since}, since

    async def _earlier(self, name: str, arrivals: dict[str, Any]) -> dict[str, int]:
        """Return the arrivals of each minute in the four weeks before the replayed period, for forecasts.

        The result is empty if the replay does not use recorded arrivals.
        """
        if arrivals["kind"] != "recorded":
            return {}
        until = arrivals["since"]
        found = await asyncio.to_thread(self.recordings.by_minute, name, until - MINUTES_KEPT_S, until)
        return {str(minute): count for minute, count in found.items()}

    async def _timing(self, deployment: Deployment, values: dict[str, Any]) -> ReplicaTiming:
        """Return the timing of a replica. Measured values replace those ``values`` that are None."""
        status = await self.operations.status(deployment.name)
        calls = [r["call_ms"] for r in status.replicas if r.get("call_ms")]
        batches = [r["batch_mean"] for r in status.replicas if r.get("batch_mean")]
        known: dict[str, Any] = {}
        engines = [r["llm"] for r in status.replicas if r.get("llm")]
        if engines:
            known |= _engine_timing(
                engines, sum(r["completed"] for r in status.replicas), status.service_rate
            )
        elif calls:
            known["call_ms"] = sum(calls) / len(calls) / deployment.instances
            known["batch"] = max(1, round(sum(batches) / len(batches))) if batches else 1
        elif status.service_rate:
            known["call_ms"] = 1000.0 / status.service_rate
        if status.start_s:
            known["start_s"] = status.start_s
        known |= {key: value for key, value in values.items() if value is not None}
        if "call_ms" not in known:
            raise BadRequest(
                f"No call of {deployment.name} has been measured yet. Set service.call_ms in the request."
            )
        return ReplicaTiming(**known)

    async def _run_process(self, document: dict[str, Any]) -> dict[str, Any]:
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
                    out, errors = await process.communicate(orjson.dumps(document))
            except TimeoutError:
                raise DeadlinePassed(
                    f"The replay took more than {TIME_LIMIT_S:g} s. Set a shorter period or fewer policies."
                ) from None
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
        return _result(process.returncode, out, errors)


def _engine_timing(
    engines: Sequence[Mapping[str, Any]], completed: int, service_rate: float | None
) -> dict[str, Any]:
    """Return the timing of a language model's replicas, computed from what their engines report."""
    known: dict[str, Any] = {"slots": max(max((e["slots"] or 1) for e in engines), 1)}
    if service_rate:
        known["call_ms"] = 1000.0 * known["slots"] / service_rate
    if completed:
        known["prompt_tokens"] = round(sum(e["prompt_tokens"] or 0 for e in engines) / completed)
    return known


def _result(code: int | None, out: bytes, errors: bytes) -> dict[str, Any]:
    if code != 0:
        last = errors.decode(errors="replace").strip().splitlines()[-1:] or ["no output"]
        raise Unavailable(f"The replay failed (exit code {code}): {last[0]}")
    answer: dict[str, Any] = orjson.loads(out)
    if "error" in answer:
        kind: type[TidegateError] = BY_REASON.get(answer["error"]["reason"], BadRequest)
        raise kind(answer["error"]["message"])
    result: dict[str, Any] = answer["result"]
    return result
