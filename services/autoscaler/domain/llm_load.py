"""Measure the load of a language model: waiting prompts, busy slots, and the KV cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from services.autoscaler.domain.memory import LlmLoad, LoadMemory, Sample
from services.autoscaler.domain.snapshot import Policy
from tidegate.kernel.protocol.models import Deployment, LlmSpec, Version
from tidegate.kernel.protocol.presence import EngineReport, GatewayView, ReplicaReport


def slots_of(deployment: Deployment, reports: Iterable[ReplicaReport]) -> int:
    """Return the number of slots of one engine.

    This is the highest number that a replica reports, or the Deployment's setting if no replica reports one.
    """
    reported = [r.llm.slots for r in reports if r.llm is not None and r.llm.slots]
    declared = deployment.llm or LlmSpec()
    return max(1, max(reported, default=declared.slots))


def is_llm(version: Version | None) -> bool:
    """Return True if the version is a language model."""
    return version is not None and version.format == "llm"


def measure_llm(
    deployment: Deployment,
    gateways: GatewayView | None,
    reports: Sequence[ReplicaReport],
    memory: LoadMemory,
    policy: Policy,
    now: float,
) -> tuple[LlmLoad, LoadMemory]:
    """Return the load of a language model. ``reports`` are the reports of its replicas."""
    name, slots = deployment.name, slots_of(deployment, reports)
    loads = [g.deployments[name] for g in gateways.reports if name in g.deployments] if gateways else []
    ready = [r for r in reports if r.state == "ready"]
    engines = [r.llm or EngineReport() for r in ready]
    # If an engine does not report how many requests it runs, use the number that its replica has in flight.
    running = sum(r.inflight if e.running is None else e.running for r, e in zip(ready, engines, strict=True))
    sized = [e for e in engines if e.kv_total]
    memory = _with_reading(reports, memory, policy, now)
    load = LlmLoad(
        waiting=sum(load.waiting for load in loads),
        waiting_tokens=sum(load.waiting_tokens for load in loads),
        slots=slots * len(ready),
        running=min(running, slots * len(ready)),
        engine_waiting=sum(e.waiting or 0 for e in engines),
        # Count the cache of an idle engine as empty, because it has only old prompts, which new requests
        # replace.
        kv_used=sum((e.kv_used or 0) if e.running != 0 else 0 for e in sized),
        kv_total=sum(e.kv_total or 0 for e in sized),
        tokens_per_s=_rate(memory.read),
    )
    return load, memory


def _with_reading(
    reports: Iterable[ReplicaReport], memory: LoadMemory, policy: Policy, now: float
) -> LoadMemory:
    """Return ``memory`` with a new sample of the prompt tokens that all engines have computed."""
    more, prompts = 0, {}
    for report in reports:
        if report.llm is None or report.llm.prompt_tokens is None:
            continue
        # Leave out the tokens that the engine found in its KV cache, because it did not compute them.
        total = max(0, report.llm.prompt_tokens - (report.llm.cached_tokens or 0))
        more += max(0, total - memory.prompts.get(report.replica, total))
        prompts[report.replica] = total
    last = memory.read[-1].count if memory.read else 0.0
    read = (*memory.read, Sample(now, last + more))
    since = now - policy.service_window_s
    start = 0
    while start + 1 < len(read) and read[start + 1].at <= since:
        start += 1
    return replace(memory, prompts=prompts, read=read[start:])


def _rate(samples: tuple[Sample, ...]) -> float | None:
    if not samples or samples[-1].at <= samples[0].at or samples[-1].count <= samples[0].count:
        return None
    return (samples[-1].count - samples[0].count) / (samples[-1].at - samples[0].at)
