"""How much is asked of a Deployment, and how fast its replicas answer.

Demand is counted in requests: what the gateways have outstanding. It is known only when every
gateway that is known reports; a missing one makes it unknown, never smaller.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from services.autoscaler.domain.memory import Load, LoadMemory, Sample
from services.autoscaler.domain.snapshot import Policy
from tidegate.protocol.capacity import measured_rps
from tidegate.protocol.models import Version
from tidegate.protocol.presence import GatewayLoad, GatewayView, ReplicaReport


def measure(
    deployment: str,
    gateways: GatewayView | None,
    reports: Iterable[ReplicaReport],
    memory: LoadMemory,
    policy: Policy,
    now: float,
) -> tuple[Load, LoadMemory]:
    """The load on ``deployment``; ``reports`` are those of its own replicas."""
    reports = list(reports)
    demand, new, memory = _arrivals(deployment, gateways, memory, policy, now)
    memory = _service(reports, memory, policy, now)
    load = Load(
        demand=demand,
        new=new,
        arrival_rate=None if demand is None else _rate(memory.arrivals),
        ms_per_request=memory.ms_per_request,
        batch=max(1.0, memory.batch),
    )
    return load, memory


def _arrivals(
    deployment: str,
    gateways: GatewayView | None,
    memory: LoadMemory,
    policy: Policy,
    now: float,
) -> tuple[int | None, int, LoadMemory]:
    if gateways is None or not gateways.reports:
        return None, 0, memory
    loads = {r.incarnation: r.deployments.get(deployment, GatewayLoad()) for r in gateways.reports}
    # A gateway that was not there before brings its whole total; at the very first look nobody
    # knows since when that total runs, so it is the zero of the count.
    first = not memory.arrivals
    new = 0
    for incarnation, load in loads.items():
        before = memory.arrived.get(incarnation, load.arrived if first else 0)
        new += max(0, load.arrived - before)
    total = memory.arrivals[-1].count + new if memory.arrivals else 0.0
    memory = replace(
        memory,
        arrived={**memory.arrived, **{i: load.arrived for i, load in loads.items()}},
        arrivals=_window((*memory.arrivals, Sample(now, total)), now - policy.rate_window_s),
    )
    if gateways.missing:
        return None, new, memory
    known = {i: n for i, n in memory.arrived.items() if i in loads}
    return (
        sum(load.outstanding for load in loads.values()),
        new,
        replace(memory, arrived=known),
    )


def _service(reports: list[ReplicaReport], memory: LoadMemory, policy: Policy, now: float) -> LoadMemory:
    """Time per request over the window, from the sums the workers keep (Little's law needs no more)."""
    done, busy = 0, 0.0
    served: dict[str, tuple[int, float]] = {}
    for report in reports:
        now_done, now_busy = report.completed + report.failed, report.busy_ms
        old_done, old_busy = memory.served.get(report.replica, (now_done, now_busy))
        done += max(0, now_done - old_done)
        busy += max(0.0, now_busy - old_busy)
        served[report.replica] = (now_done, now_busy)
    last = memory.services[-1] if memory.services else Sample(now, 0.0)
    services = _window(
        (*memory.services, Sample(now, last.count + done, last.busy_ms + busy)),
        now - policy.service_window_s,
    )
    return replace(
        memory,
        served=served,
        services=services,
        ms_per_request=_ms_per_request(services, reports) or memory.ms_per_request,
        batch=_mean(r.batch_mean for r in reports) or memory.batch,
    )


def _ms_per_request(services: tuple[Sample, ...], reports: list[ReplicaReport]) -> float | None:
    done = services[-1].count - services[0].count
    busy = services[-1].busy_ms - services[0].busy_ms
    if done > 0 and busy > 0:
        return busy / done
    # Nothing finished while we looked: the workers' own recent means, after our restart for example.
    return _mean(r.call_ms / max(1.0, r.batch_mean or 1.0) for r in reports if r.call_ms)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _rate(samples: tuple[Sample, ...]) -> float | None:
    span = samples[-1].at - samples[0].at if samples else 0.0
    return (samples[-1].count - samples[0].count) / span if span > 0 else None


def _window(samples: tuple[Sample, ...], since: float) -> tuple[Sample, ...]:
    """The samples of the window and one before it, so that the window is always covered."""
    start = 0
    while start + 1 < len(samples) and samples[start + 1].at <= since:
        start += 1
    return samples[start:]


def or_guessed(load: Load, version: Version | None) -> Load:
    """``load``; where no service rate is known yet, with the one that `tidegate tune` measured."""
    rps = measured_rps(version.metadata.metrics) if version is not None else None
    if load.ms_per_request is not None or rps is None:
        return load
    shown = f"{rps:,.0f}" if rps >= 10 else f"{rps:.2g}"
    guess = f"a first guess: its version's measured capacity, {shown} requests/s"
    return replace(load, ms_per_request=1000.0 / rps, guess=guess)


def reports_by_deployment(
    reports: Mapping[str, ReplicaReport] | None,
) -> dict[str, list[ReplicaReport]]:
    """Heartbeats grouped by Deployment; none at all while the store cannot be read."""
    grouped: dict[str, list[ReplicaReport]] = {}
    for report in (reports or {}).values():
        grouped.setdefault(report.deployment, []).append(report)
    return grouped
