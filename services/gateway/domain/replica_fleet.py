"""Summarize the replicas of each Deployment from their reports: number, speed and problems."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from services.gateway.domain.fair_lane import UNLIMITED, FlowLoad
from services.gateway.domain.replica_choice import ReplicaSlots
from services.gateway.domain.sequences import SequenceSlots
from tidegate.kernel.protocol.presence import GatewayLoad, GatewayView, ReplicaReport

LOAD_FAILED = "LoadFailed"


@dataclass(frozen=True, slots=True)
class ReplicaFleet:
    """A summary of a Deployment's replicas from their last reports. None: the value is not known.

    ``request_ms``: the model's time per request in recent calls. ``full_ms``: the model's time per request if
    the replicas are fully loaded. ``elsewhere``: the number of requests that other gateways have in flight.
    ``start_ms``: the ms until the next replica is ready. ``fault``: why no replica can start, or empty.
    ``load_failed``: True if the model cannot be loaded and no replica can answer. ``reloading``: a message if
    no replica is ready and a replica loads its model again, or empty.

    ``replicas``: the ready replicas of a decoupled model. ``sequences``: the ready replicas of a stateful
    model. ``parallel``: how many requests a fully loaded replica finishes in the time of one call. ``holds``:
    how many requests all ready replicas together can hold, including those that wait. It is 0 if a ready
    replica does not report how many it can hold. ``flows_elsewhere``: the requests of each flow at other
    gateways. ``gateways``: the number of other gateways with requests in flight for this Deployment, plus 1
    for this gateway. ``host_busy``: the share (0 to 1) of busy cores on the busiest host.
    """

    ready: int = 0
    request_ms: float | None = None
    full_ms: float | None = None
    elsewhere: int = 0
    start_ms: float | None = None
    fault: str = ""
    load_failed: bool = False
    reloading: str = ""
    replicas: tuple[ReplicaSlots, ...] = ()
    parallel: float = 1.0
    holds: int = 0
    flows_elsewhere: Mapping[str, FlowLoad] = field(default_factory=dict)
    gateways: int = 1
    host_busy: float | None = None
    sequences: tuple[SequenceSlots, ...] = ()


class LoadElsewhere(NamedTuple):
    """A Deployment's requests in flight at other gateways.

    ``gateways``: the number of gateways that have such requests.
    """

    outstanding: int
    flows: Mapping[str, FlowLoad]
    gateways: int


NONE_ELSEWHERE = LoadElsewhere(0, {}, 0)
UNKNOWN_FLEET = ReplicaFleet()
# While no replica is ready, a gateway publishes at most this many requests. They wake the model, and they are
# enough work for the first replica.
STARTING_WINDOW = 32


def window_of(fleet: ReplicaFleet) -> int:
    """Return how many unanswered requests a gateway may have published to a Deployment.

    Further requests wait in the gateway. The number is just enough to keep the replicas busy. There is no
    limit if nothing is known about the replicas. There is also no limit if a worker of an earlier Tidegate
    version does not report how many requests it can hold.
    """
    if fleet is UNKNOWN_FLEET:
        return UNLIMITED
    if not fleet.ready:
        return STARTING_WINDOW
    return max(1, math.ceil(fleet.holds / max(fleet.gateways, 1))) if fleet.holds else UNLIMITED


class ReplicaFault(NamedTuple):
    """The fields of ``ReplicaFleet`` that describe problems. The defaults mean no problem."""

    fault: str = ""
    load_failed: bool = False
    reloading: str = ""


def fleets(
    reports: list[ReplicaReport],
    elsewhere: Mapping[str, LoadElsewhere] | None = None,
    statuses: dict[str, dict[str, Any]] | None = None,
    now: float = 0.0,
) -> dict[str, ReplicaFleet]:
    """Return a summary of each Deployment's replicas, by the Deployment's name.

    ``elsewhere``: the requests at other gateways. ``statuses``: the status of each Deployment. ``now``:
    seconds since the epoch.
    """
    ready: dict[str, list[ReplicaReport]] = defaultdict(list)
    others: dict[str, list[ReplicaReport]] = defaultdict(list)
    for report in reports:
        (ready if report.state == "ready" else others)[report.deployment].append(report)
    elsewhere, statuses = elsewhere or {}, statuses or {}
    result = {}
    for name in ready.keys() | others.keys() | elsewhere.keys() | statuses.keys():
        measured = [report for report in ready[name] if report.call_ms is not None]
        start_ms, fault = None, ReplicaFault()
        if not ready[name]:
            status = statuses.get(name, {})
            fault = replica_fault(others[name], status)
            start_ms = None if fault.fault else _start_ms(status, now)
        result[name] = ReplicaFleet(
            len(ready[name]),
            _mean([(r.call_ms or 0.0) / max(r.batch_mean or 1.0, 1.0) for r in measured]),
            _mean([(r.call_ms or 0.0) / r.parallel for r in measured]),
            (load := elsewhere.get(name, NONE_ELSEWHERE)).outstanding,
            start_ms,
            *fault,
            tuple(ReplicaSlots(r.replica, r.inflight, int(r.parallel)) for r in ready[name] if _decoupled(r)),
            _mean([r.parallel for r in ready[name]]) or 1.0,
            sum(r.holds for r in ready[name]) if all(r.holds for r in ready[name]) else 0,
            load.flows,
            1 + load.gateways,
            max((r.host_busy for r in ready[name] if r.host_busy is not None), default=None),
            tuple(SequenceSlots(r.replica, r.sequence_slots) for r in ready[name] if r.sequence_slots),
        )
    return result


def _decoupled(report: ReplicaReport) -> bool:
    return report.signature is not None and bool(report.signature.get("decoupled"))


def replica_fault(reports: Sequence[ReplicaReport], status: Mapping[str, Any]) -> ReplicaFault:
    """Return why a Deployment without ready replicas cannot answer.

    ``reports``: the reports of its replicas.
    """
    reloads = [
        report.message or "the replica loads its model again"
        for report in reports
        if report.state == "starting" and report.ready_at
    ]
    reloading = reloads[0] if reloads else ""
    failed = next((c for c in status.get("conditions", ()) if c["type"] == "Loaded" and not c["ok"]), None)
    if failed is None:
        return ReplicaFault(reloading=reloading)
    # Also check the Deployment's status: the store may have lost the reports of replicas that still answer.
    serving = status.get("ready") or status.get("draining") or any(r.state == "draining" for r in reports)
    by_model = failed.get("reason") == LOAD_FAILED
    return ReplicaFault(failed["message"], by_model and not serving and not reloads, reloading)


def loads_elsewhere(view: GatewayView, incarnation: str) -> dict[str, LoadElsewhere]:
    """Return the load of all other gateways, by Deployment.

    ``incarnation``: the id of this gateway process.
    """
    loads: dict[str, list[GatewayLoad]] = defaultdict(list)
    for report in view.reports:
        if report.incarnation != incarnation:
            for name, load in report.deployments.items():
                loads[name].append(load)
    return {name: _sum(each) for name, each in loads.items()}


def _sum(loads: Sequence[GatewayLoad]) -> LoadElsewhere:
    flows: dict[str, FlowLoad] = {}
    for load in loads:
        for name, (outstanding, weight) in load.flows.items():
            known = flows.get(name)
            flows[name] = FlowLoad(outstanding + (known.outstanding if known else 0), weight)
    outstanding = sum(load.outstanding for load in loads)
    return LoadElsewhere(outstanding, flows, sum(load.outstanding > 0 for load in loads))


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _start_ms(status: dict[str, Any], now: float) -> float | None:
    """Estimate the ms until a replica is ready; None if there was no cold start yet.

    The estimate is the slowest of the last three cold starts, minus the time since the present start began.
    """
    past: list[float] = [start["total_ms"] for start in status.get("cold_starts", ())[-3:]]
    if not past:
        return None
    begun = [r["launched_at"] for r in status.get("replicas", ()) if r.get("state") == "starting"]
    since_ms = max(0.0, now - min(begun)) * 1e3 if begun else 0.0
    return max(max(past) - since_ms, 0.0)
