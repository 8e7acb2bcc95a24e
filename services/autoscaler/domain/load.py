"""Measure the load of a Deployment, and how fast its replicas serve requests.

Demand is the number of requests that gateways have sent and that are not answered, plus the jobs that wait or
run. It is known only if all known gateways report and the jobs can be counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import pairwise
from statistics import fmean
from typing import NamedTuple

from services.autoscaler.domain.memory import Load, LoadMemory, Sample
from services.autoscaler.domain.snapshot import Policy
from tidegate.kernel.protocol.capacity import measured_rps
from tidegate.kernel.protocol.models import Version
from tidegate.kernel.protocol.presence import GatewayLoad, GatewayReport, GatewayView, ReplicaReport

# The conditions for a trend. There are at least ``TREND_POINTS`` rates. R squared is at least
# ``TREND_EXPLAINS``. The slope is more than ``TREND_CLEAR`` standard errors.
TREND_POINTS = 6
TREND_EXPLAINS = 0.85
TREND_CLEAR = 3.0


def measure(
    deployment: str,
    gateways: GatewayView | None,
    jobs: Mapping[str, int] | None,
    reports: Iterable[ReplicaReport],
    memory: LoadMemory,
    policy: Policy,
    now: float,
    slots: int = 1,
    start_s: float = 0.0,
) -> tuple[Load, LoadMemory]:
    """Return the load of ``deployment``, and its :class:`LoadMemory` after this round.

    ``reports``: the reports of its replicas. ``jobs``: the number of unfinished jobs by Deployment.
    ``slots``: the number of model instances in a replica. ``start_s``: the seconds until a new replica is
    ready.
    """
    reports = list(reports)
    windows = _windows(memory.ms_per_request, start_s, policy)
    outstanding, new, memory = _arrivals(deployment, gateways, memory, windows.whole_s, policy, now)
    waiting = None if jobs is None else jobs.get(deployment, 0)
    at_least = sum(g.deployments[deployment].outstanding for g in _reporting(gateways, deployment))
    memory = _service(reports, memory, policy, now, slots)
    known = outstanding is not None
    burst = _window(memory.arrivals, now - windows.burst_s)
    load = Load(
        demand=None if outstanding is None or waiting is None else outstanding + waiting,
        at_least=at_least + (waiting or 0),
        new=new,
        arrival_rate=_rate(memory.arrivals, windows.burst_s) if known else None,
        burst_rate=_rate(burst, windows.burst_s) if known else None,
        trend=memory.trend if known else 0.0,
        ms_per_request=memory.ms_per_request,
        batch=max(1.0, memory.batch),
        slots=slots,
        utilization=_utilization(memory.services),
        gpu_utilization=_mean(r.gpu_utilization for r in reports if r.state == "ready"),
        measured=memory.services[-1].count > memory.services[0].count,
        # Do not count the sequences of a draining replica: they end there and need no other replica.
        sequences=sum(r.sequences for r in reports if r.state == "ready"),
        sequence_slots=max((r.sequence_slots for r in reports), default=0),
    )
    return load, memory


class _Windows(NamedTuple):
    whole_s: float
    burst_s: float


def _windows(each_ms: float | None, start_s: float, policy: Policy) -> _Windows:
    """Return the windows over which arrivals are counted for a rate.

    A count of n random arrivals has a standard deviation of sqrt(n). A busy replica serves one arrival per
    service time. So about 30 arrivals for each replica fall into a window of 30 service times. The standard
    deviation of this count is 18 % of it, which is exact enough. If a start takes long, the window is at
    least a quarter of the start time, so that a short peak starts no replica. The policy limits the length of
    the window.
    """
    window = max(policy.rate_window_s, 0.03 * (each_ms or 0.0), start_s / 4)
    whole = min(policy.longest_rate_window_s, window)
    return _Windows(whole, policy.burst_window_s * whole / policy.rate_window_s)


def _reporting(gateways: GatewayView | None, deployment: str) -> list[GatewayReport]:
    return [g for g in gateways.reports if deployment in g.deployments] if gateways else []


def _arrivals(
    deployment: str,
    gateways: GatewayView | None,
    memory: LoadMemory,
    window_s: float,
    policy: Policy,
    now: float,
) -> tuple[int | None, int, LoadMemory]:
    if gateways is None or not gateways.reports:
        return None, 0, memory
    loads = {r.incarnation: r.deployments.get(deployment, GatewayLoad()) for r in gateways.reports}
    # The first round counts no arrivals, because it is not known when they arrived. In a later round, all
    # arrivals of a gateway count if the gateway is new.
    first = not memory.arrivals
    new = 0
    for incarnation, load in loads.items():
        before = memory.arrived.get(incarnation, load.arrived if first else 0)
        new += max(0, load.arrived - before)
    total = memory.arrivals[-1].count + new if memory.arrivals else 0.0
    memory = replace(
        _followed(memory, Sample(now, total), policy),
        arrived={**memory.arrived, **{i: load.arrived for i, load in loads.items()}},
        arrivals=_window((*memory.arrivals, Sample(now, total)), now - window_s),
    )
    if gateways.missing:
        return None, new, memory
    known = {i: n for i, n in memory.arrived.items() if i in loads}
    return (
        sum(load.outstanding for load in loads.values()),
        new,
        replace(memory, arrived=known),
    )


def _followed(memory: LoadMemory, sample: Sample, policy: Policy) -> LoadMemory:
    """Return ``memory`` with ``sample`` in ``trail``, and with the new trend.

    If the last sample in ``trail`` is too recent, return ``memory`` unchanged.
    """
    if memory.trail and sample.at - memory.trail[-1].at < policy.trail_every_s:
        return memory
    trail = _window((*memory.trail, sample), sample.at - policy.trail_s)
    return replace(memory, trail=trail, trend=growth(trail))


def growth(trail: tuple[Sample, ...]) -> float:
    """Return how fast the arrival rate grows, in requests a second per second; 0 without steady growth.

    This is the slope of a least-squares line through the rates between samples. The growth is steady if the
    line explains most of the variance of the rates (R squared). A single step does not count, because its R
    squared is at most 0.75. Also, the slope must be several times the slope that random arrivals alone would
    cause.
    """
    gaps = [(a, b) for a, b in pairwise(trail) if b.at > a.at]
    if len(gaps) < TREND_POINTS:
        return 0.0
    times = [(a.at + b.at) / 2 for a, b in gaps]
    rates = [(b.count - a.count) / (b.at - a.at) for a, b in gaps]
    middle, mean = fmean(times), fmean(rates)
    spread = sum((t - middle) ** 2 for t in times)
    slope = sum((t - middle) * (r - mean) for t, r in zip(times, rates, strict=True)) / spread
    varied = sum((r - mean) ** 2 for r in rates)
    if slope <= 0 or slope**2 * spread < TREND_EXPLAINS * varied:
        return 0.0
    by_chance = math.sqrt(mean * len(gaps) / (trail[-1].at - trail[0].at) / spread)
    return slope if slope > TREND_CLEAR * by_chance else 0.0


def _utilization(services: tuple[Sample, ...]) -> float | None:
    offered = services[-1].offered_ms - services[0].offered_ms if services else 0.0
    return min(1.0, (services[-1].busy_ms - services[0].busy_ms) / offered) if offered > 0 else None


def _service(
    reports: list[ReplicaReport], memory: LoadMemory, policy: Policy, now: float, slots: int
) -> LoadMemory:
    """Return ``memory`` with the mean busy time per request in the window, from the workers' totals."""
    done, busy = 0, 0.0
    served: dict[str, tuple[int, float]] = {}
    for report in reports:
        now_done, now_busy = report.completed + report.failed, report.busy_ms
        old_done, old_busy = memory.served.get(report.replica, (now_done, now_busy))
        done += max(0, now_done - old_done)
        busy += max(0.0, now_busy - old_busy)
        served[report.replica] = (now_done, now_busy)
    last = memory.services[-1] if memory.services else Sample(now, 0.0)
    able = slots * sum(report.state == "ready" for report in reports)
    offered = last.offered_ms + able * (now - last.at) * 1000.0
    services = _window(
        (*memory.services, Sample(now, last.count + done, last.busy_ms + busy, offered)),
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
    # No request finished in the window, for example after a restart. So use the workers' mean call times.
    return _mean(r.call_ms / max(1.0, r.batch_mean or 1.0) for r in reports if r.call_ms)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _rate(samples: tuple[Sample, ...], least_s: float) -> float | None:
    """Return how much the count grows per second; None if the samples cover less than ``least_s`` s."""
    span = samples[-1].at - samples[0].at if samples else 0.0
    return (samples[-1].count - samples[0].count) / span if span >= least_s else None


def _window(samples: tuple[Sample, ...], since: float) -> tuple[Sample, ...]:
    """Return the samples of the window and the last sample before it. They cover the whole window."""
    start = 0
    while start + 1 < len(samples) and samples[start + 1].at <= since:
        start += 1
    return samples[start:]


def with_guess(load: Load, version: Version | None) -> Load:
    """Return ``load``. If its service rate is not known yet, estimate it from the version's capacity.

    The capacity was measured by `tidegate tune` with real requests, or else by the verification.
    """
    rps = measured_rps(version.metadata.metrics) if version is not None else None
    if rps is None and version is not None and version.verification.card is not None:
        rps = version.verification.card.expected_rps
    if load.ms_per_request is not None or not rps:
        return load
    shown = f"{rps:,.0f}" if rps >= 10 else f"{rps:.2g}"
    guess = f"estimated from the version's measured capacity of {shown} requests/s"
    return replace(load, ms_per_request=1000.0 * load.slots / rps, guess=guess)


def reports_by_deployment(
    reports: Mapping[str, ReplicaReport] | None,
) -> dict[str, list[ReplicaReport]]:
    """Return the heartbeats by Deployment; empty while the store cannot be read."""
    grouped: dict[str, list[ReplicaReport]] = {}
    for report in (reports or {}).values():
        grouped.setdefault(report.deployment, []).append(report)
    return grouped
