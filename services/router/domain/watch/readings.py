"""Turn totals of gateways and workers into counts since the last reading. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from services.router.domain.watch.window import ReplicaWork, Window
from tidegate.kernel.protocol.models import Endpoint
from tidegate.kernel.protocol.presence import GatewayReport, ReplicaReport
from tidegate.kernel.protocol.traffic import EndpointTraffic, TrafficReport
from tidegate.kernel.protocol.traffic_histograms import dense

# Seconds after a gateway's last report until its totals are forgotten. A report can be missing because the
# store did not answer for some time. Without the old totals, the next report would count all requests of the
# gateway again.
REMEMBERED_S = 600.0


@dataclass(frozen=True, slots=True)
class Reading:
    """All data that was read at one moment. ``dead``: the number of new dead letters by Deployment."""

    at: float
    traffic: Sequence[TrafficReport] = ()
    gateways: Sequence[GatewayReport] = ()
    replicas: Sequence[ReplicaReport] = ()
    statuses: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    endpoints: Sequence[Endpoint] = ()
    dead: Mapping[str, int] = field(default_factory=dict)
    callers: Mapping[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _SeenReplica:
    done: int
    busy_ms: float
    deaths: int


@dataclass(slots=True)
class _DeploymentSpan:
    """The numbers of a Deployment between two readings."""

    replica_s: float = 0.0
    used_s: float = 0.0
    cold_s: float = 0.0
    queue: int = 0
    queue_age_s: float = 0.0
    restarts: int = 0
    replicas: dict[str, ReplicaWork] = field(default_factory=dict)


class Readings:
    """Compute how much the reported totals grow from one reading to the next."""

    def __init__(self) -> None:
        self._traffic: dict[tuple[str, str], EndpointTraffic] = {}
        self._times: dict[tuple[str, str, str], np.ndarray] = {}
        self._replicas: dict[str, _SeenReplica] = {}
        self._ended: dict[str, float] = {}
        self._waits_since: dict[str, float] = {}
        self._reported_at: dict[str, float] = {}
        self._at: float | None = None

    def spans(self, reading: Reading) -> dict[str, Window]:
        """Return what happened since the last reading, as one window for each endpoint.

        Return an empty dict at the first reading, because there are no earlier totals.
        """
        before, self._at = self._at, reading.at
        new = before is None
        found = {each.name: Window(before or reading.at, reading.at) for each in reading.endpoints}
        for report in reading.traffic:
            for name, total in report.endpoints.items():
                self._take(found.get(name), (report.incarnation, name), total, new)
        self._forget(reading)
        deployments = self._deployments(reading, max(0.0, reading.at - (before or reading.at)))
        if new:
            return {}
        users = _users(reading.endpoints)
        for endpoint in reading.endpoints:
            window = found[endpoint.name]
            window.callers = reading.callers.get(endpoint.name, 0)
            for name in deployments_of(endpoint):
                share = _share(name, users[name], window, found)
                _add(window, deployments.get(name), share)
                window.dead += reading.dead.get(name, 0)
        return found

    def _take(self, window: Window | None, key: tuple[str, str], total: EndpointTraffic, new: bool) -> None:
        seen = self._traffic.get(key, total if new else EndpointTraffic())
        if _began_again(seen, total):
            seen = EndpointTraffic()
        self._traffic[key] = total
        fresh: dict[str, np.ndarray] = {}
        for name, rows in total.times.items():
            now = dense(rows)
            before = self._times.get((*key, name), now if new else np.zeros_like(now))
            fresh[name] = now if (now < before).any() else now - before
            self._times[*key, name] = now
        if window is None or new:
            return
        window.failed += max(0, total.failed - seen.failed)
        for outcome, count in total.outcomes.items():
            more = count - seen.outcomes.get(outcome, 0)
            if more > 0:
                window.outcomes[outcome] = window.outcomes.get(outcome, 0) + more
        for name, times in fresh.items():
            window.times = window.times + times
            if answers := int(times[0].sum()):
                window.answered_by[name] = window.answered_by.get(name, 0) + answers

    def _forget(self, reading: Reading) -> None:
        """Forget the totals of gateways that have not reported for ``REMEMBERED_S``."""
        self._reported_at |= {report.incarnation: reading.at for report in reading.traffic}
        gone = {name for name, at in self._reported_at.items() if reading.at - at > REMEMBERED_S}
        if gone:
            self._reported_at = {name: at for name, at in self._reported_at.items() if name not in gone}
            self._traffic = {key: each for key, each in self._traffic.items() if key[0] not in gone}
            self._times = {key: each for key, each in self._times.items() if key[0] not in gone}

    def _deployments(self, reading: Reading, seconds: float) -> dict[str, _DeploymentSpan]:
        spans: dict[str, _DeploymentSpan] = {}
        outstanding: dict[str, int] = {}
        for report in reading.gateways:
            for name, load in report.deployments.items():
                outstanding[name] = outstanding.get(name, 0) + load.outstanding
        for name, status in reading.statuses.items():
            span = spans.setdefault(name, _DeploymentSpan())
            running = status.get("ready", 0) + status.get("starting", 0) + status.get("draining", 0)
            span.replica_s = running * seconds
            span.used_s = span.replica_s * min(1.0, status.get("utilization") or 0.0)
            span.queue = outstanding.get(name, status.get("demand") or 0)
            span.queue_age_s = self._age(name, span.queue, status, reading.at)
            span.cold_s = seconds if span.queue and not status.get("ready", 0) else 0.0
            span.restarts = self._new_ends(name, status)
        for replica in reading.replicas:
            self._work(replica, spans.setdefault(replica.deployment, _DeploymentSpan()), seconds)
        known = {replica.replica for replica in reading.replicas}
        self._replicas = {name: each for name, each in self._replicas.items() if name in known}
        return spans

    def _age(self, name: str, queue: int, status: Mapping[str, Any], now: float) -> float:
        """Estimate the age of the oldest waiting request, in seconds."""
        if queue and not status.get("ready", 0):
            return now - self._waits_since.setdefault(name, now)
        self._waits_since.pop(name, None)
        return float(status.get("predicted_wait_ms") or 0.0) / 1e3 if queue else 0.0

    def _new_ends(self, name: str, status: Mapping[str, Any]) -> int:
        moments = [float(each.get("at", 0.0)) for each in status.get("ended", ())]
        last = self._ended.get(name)
        self._ended[name] = max([last or 0.0, *moments])
        return 0 if last is None else sum(moment > last for moment in moments)

    def _work(self, replica: ReplicaReport, span: _DeploymentSpan, seconds: float) -> None:
        deaths = replica.death.total if replica.death is not None else 0
        done = replica.completed + replica.failed
        seen = self._replicas.get(replica.replica)
        self._replicas[replica.replica] = _SeenReplica(done, replica.busy_ms, deaths)
        if seen is None:
            return
        requests = max(0, done - seen.done)
        span.restarts += max(0, deaths - seen.deaths)
        span.replicas[replica.replica] = ReplicaWork(
            requests,
            max(0.0, replica.busy_ms - seen.busy_ms) / 1e3,
            requests * (replica.call_ms or 0.0),
            requests * (replica.batch_mean or 0.0),
            seconds if replica.inflight and not requests and replica.state == "ready" else 0.0,
        )


def _began_again(seen: EndpointTraffic, total: EndpointTraffic) -> bool:
    """Return True if a count is smaller than before. Then the endpoint was removed and created again."""
    smaller = any(total.outcomes.get(outcome, 0) < count for outcome, count in seen.outcomes.items())
    return smaller or total.failed < seen.failed


def deployments_of(endpoint: Endpoint) -> list[str]:
    """Return the Deployments that an endpoint may use now: its targets, then its previous targets."""
    names = [target.deployment for target in (*endpoint.targets, *endpoint.previous)]
    return list(dict.fromkeys(names))


def _users(endpoints: Iterable[Endpoint]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for endpoint in endpoints:
        for name in deployments_of(endpoint):
            found.setdefault(name, []).append(endpoint.name)
    return found


def _share(deployment: str, users: Sequence[str], window: Window, all_: Mapping[str, Window]) -> float:
    """Return the share of a Deployment's answers that were for the endpoint of ``window``.

    ``users``: all endpoints that use the Deployment. If the Deployment gave no answers, they get equal
    shares.
    """
    if len(users) == 1:
        return 1.0
    total = sum(all_[name].answered_by.get(deployment, 0) for name in users)
    return window.answered_by.get(deployment, 0) / total if total else 1.0 / len(users)


def _add(window: Window, span: _DeploymentSpan | None, share: float) -> None:
    if span is None:
        return
    window.replica_s += span.replica_s * share
    window.used_s += span.used_s * share
    window.cold_s = max(window.cold_s, span.cold_s)
    window.queue += span.queue
    window.queue_age_s = max(window.queue_age_s, span.queue_age_s)
    window.restarts += span.restarts
    window.replicas |= span.replicas
