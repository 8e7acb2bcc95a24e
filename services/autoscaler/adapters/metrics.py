"""The Prometheus metrics of the autoscaler."""

from __future__ import annotations

import shutil
from collections.abc import Container, Iterable, Mapping
from pathlib import Path

from prometheus_client import Counter, Gauge, Histogram

from services.autoscaler.domain.costs.lives import NS, OBSERVED, Amount, Place
from services.autoscaler.domain.snapshot import Action, Decision, Kill
from tidegate.kernel.protocol.deployment_status import DeploymentStatus

REPLICAS = Gauge(
    "tidegate_autoscaler_replicas",
    "Replicas by state (desired, ready, starting, draining).",
    ["deployment", "state"],
)
DEMAND = Gauge(
    "tidegate_autoscaler_demand",
    "Requests and jobs that wait or run; NaN if the number is not known.",
    ["deployment"],
)
MEMORY = Gauge(
    "tidegate_autoscaler_memory_bytes", "Measured memory (RAM) of all replicas' processes.", ["deployment"]
)
GPU_MEMORY = Gauge(
    "tidegate_autoscaler_gpu_memory_bytes",
    "Used memory of the GPUs that the replicas run on. A GPU that two replicas share is counted twice.",
    ["deployment"],
)
GPU_UTILIZATION = Gauge(
    "tidegate_autoscaler_gpu_utilization",
    "Mean utilization of the replicas' GPUs, from 0 to 1.",
    ["deployment"],
)
DISK = Gauge("tidegate_autoscaler_disk_bytes", "Size of the disk of the state folder.")
DISK_FREE = Gauge("tidegate_autoscaler_disk_free_bytes", "Free bytes on the disk of the state folder.")
DECISIONS = Counter("tidegate_autoscaler_decisions_total", "Decisions by rule.", ["deployment", "rule"])
REPLACEMENTS = Counter(
    "tidegate_autoscaler_replacements_total", "Replicas that ended, by cause.", ["deployment", "cause"]
)
LAUNCH_SECONDS = Histogram(
    "tidegate_autoscaler_launch_to_ready_seconds",
    "Seconds from the decision to launch a replica until it is ready.",
    ["deployment"],
    buckets=(0.5, 1, 2, 3, 5, 8, 13, 20, 30, 60, 120, 300, 600),
)
ROUND_SECONDS = Histogram(
    "tidegate_autoscaler_round_seconds",
    "Seconds of one round, in which the autoscaler observes, decides and acts.",
    buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10),
)
# The label `flavour` contains the pool's name. Dashboards of operators may use this label, so it is not
# renamed.
WARM_WORKERS = Gauge(
    "tidegate_autoscaler_warm_workers",
    "Workers of the warm pool that are available: ready, and without a model.",
    ["flavour"],
)
WARM_GIVEN = Counter(
    "tidegate_autoscaler_warm_given_total",
    "Replicas that were requested from the warm pool, by outcome: given, not taken (no worker accepted "
    "the offer), none waits (no worker of the pool was idle).",
    ["flavour", "outcome"],
)
VERIFICATIONS = Counter(
    "tidegate_autoscaler_verifications_total",
    "Ended verifications of versions, by state: verified, rejected, skipped.",
    ["state"],
)
VERIFYING = Gauge("tidegate_autoscaler_verifications_pending", "Versions with a pending verification.")
REPLICA_SECONDS = Counter(
    "tidegate_autoscaler_replica_seconds_total",
    "Seconds of replicas, by part: busy, idle, starting, wasted, stopping, unreported.",
    ["deployment", "part"],
)
COST = Counter(
    "tidegate_autoscaler_cost_total",
    "Cost of the replicas' time, by part, in the price list's currency. "
    "The part `tokens` is the cost of a provider's tokens.",
    ["deployment", "part"],
)
OVER_BUDGET = Gauge(
    "tidegate_autoscaler_over_budget", "1 while a budget of the Deployment is used up.", ["deployment"]
)
STATES = ("desired", "ready", "starting", "draining")
MIB = 2**20


def show(statuses: Mapping[str, DeploymentStatus], gone: Iterable[str]) -> None:
    """Set the gauges, and remove those of deleted Deployments (``gone``)."""
    for name in gone:
        for state in STATES:
            REPLICAS.remove(name, state)
        for gauge in (DEMAND, MEMORY, GPU_MEMORY, GPU_UTILIZATION):
            gauge.remove_by_labels({"deployment": name})
    for name, status in statuses.items():
        for state in STATES:
            REPLICAS.labels(name, state).set(getattr(status, state))
        DEMAND.labels(name).set(float("nan") if status.demand is None else status.demand)
        MEMORY.labels(name).set(sum(each.get("memory_mb") or 0 for each in status.replicas) * MIB)
        if status.gpu_utilization is not None:  # the replicas run on GPUs
            GPU_UTILIZATION.labels(name).set(status.gpu_utilization)
            GPU_MEMORY.labels(name).set(status.gpu_memory_bytes or 0)


def measure_disk(folder: Path) -> None:
    """Let the two disk metrics measure the disk of ``folder`` each time they are read.

    A metric is NaN if the disk cannot be measured.
    """

    def measured(which: str) -> float:
        try:
            return float(getattr(shutil.disk_usage(folder), which))
        except OSError:
            return float("nan")

    DISK.set_function(lambda: measured("total"))
    DISK_FREE.set_function(lambda: measured("free"))


def book(bookings: Mapping[Place, Amount]) -> None:
    """Add the booked time of replicas and its cost to the counters."""
    for place, amount in bookings.items():
        if place.part.kind == OBSERVED:
            continue
        REPLICA_SECONDS.labels(place.deployment, place.part.kind).inc(amount.spent.ns / NS)
        COST.labels(place.deployment, place.part.kind).inc(amount.cost)
        if amount.token_cost:
            COST.labels(place.deployment, "tokens").inc(amount.token_cost)


def show_budgets(limited: Iterable[str], used_up: Container[str]) -> None:
    """Set the gauge of each Deployment with a budget: 1 if the budget is used up, else 0."""
    OVER_BUDGET.clear()
    for name in limited:
        OVER_BUDGET.labels(name).set(name in used_up)


def count(decisions: Iterable[Decision], actions: Iterable[tuple[str, Action]]) -> None:
    """Count decisions, and the replicas that are killed. ``actions``: pairs of a Deployment and an action."""
    for decision in decisions:
        DECISIONS.labels(decision.deployment, decision.rule).inc()
    for deployment, action in actions:
        if isinstance(action, Kill):
            REPLACEMENTS.labels(deployment, action.cause).inc()
