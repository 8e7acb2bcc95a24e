"""``python -m benchmarks.fleet``: measure a round of the autoscaler over simulated fleets of several sizes.

Each Deployment has five busy replicas. There are four gateways, and in every round the load of one in ten
Deployments changes. The times are those of the decisions, of the statuses, and of the record of the round.
Started replicas are ready immediately, and drained ones end immediately. At 1,000 Deployments, the 99th
percentile of the rounds must be below a second.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import options, report, session
from services.autoscaler.adapters.history.recordings import Recordings
from services.autoscaler.application.recorder import Recorder
from services.autoscaler.domain.decide import decide
from services.autoscaler.domain.launcher import Running, fingerprint, replica_name
from services.autoscaler.domain.memory import State
from services.autoscaler.domain.snapshot import Launch, Plan, Policy, Snapshot
from services.autoscaler.domain.status import statuses
from tidegate.kernel.protocol.deployment_status import DeploymentStatus
from tidegate.kernel.protocol.models import Deployment, DesiredState, Endpoint, Target, Version
from tidegate.kernel.protocol.presence import GatewayLoad, GatewayReport, GatewayView, ReplicaReport

START, PERIOD_S = 1_700_000_000.0, 0.5
BORN = datetime(2024, 1, 1, tzinfo=UTC)
EACH, GATEWAYS, CHANGING = 5, 4, 0.1
LIMIT_S, LIMIT_AT = 1.0, 1000
WARM = 70  # rounds until every window is full
CALL_MS = 20.0


@dataclass(slots=True)
class World:
    """A fleet without a launcher: replicas are ready as soon as they are started."""

    desired_state: DesiredState
    running: dict[str, Running]
    draw: random.Random = field(default_factory=lambda: random.Random(7))
    arrived: dict[str, int] = field(default_factory=dict)
    outstanding: dict[str, int] = field(default_factory=dict)
    rounds: int = 0

    def snapshots(self) -> Iterator[Snapshot]:
        """Yield the observation of each round, endlessly."""
        names = [deployment.name for deployment in self.desired_state.deployments]
        self.outstanding = dict.fromkeys(names, 40)
        self.arrived = dict.fromkeys(names, 0)
        while True:
            self.rounds += 1
            for name in names:
                self.arrived[name] += 25
                if self.draw.random() < CHANGING:
                    self.outstanding[name] = self.draw.randrange(20, 120)
            running = tuple(sorted(self.running.values(), key=lambda each: each.replica))
            reports = {each.replica: self._report(each) for each in running}
            yield Snapshot(self.desired_state, running, reports, self._gateways(names))

    def act(self, plan: Plan) -> None:
        """Apply the decisions."""
        for action in plan.actions:
            if isinstance(action, Launch):
                self.running[action.replica] = replica(action.deployment, action.slot, action.generation)
            else:
                self.running.pop(action.replica, None)

    def _report(self, running: Running) -> ReplicaReport:
        return ReplicaReport(
            replica=running.replica,
            deployment=running.deployment,
            generation=running.generation,
            host="h",
            pid=running.pid,
            state="ready",
            inflight=8,
            completed=20 * self.rounds,
            busy_ms=400.0 * self.rounds,
            call_ms=CALL_MS,
            batch_mean=1.0,
        )

    def _gateways(self, names: list[str]) -> GatewayView:
        share = {
            name: GatewayLoad(self.outstanding[name] // GATEWAYS, self.arrived[name] // GATEWAYS)
            for name in names
        }
        return GatewayView(
            [GatewayReport(f"g{number}", 0.0, dict(share)) for number in range(GATEWAYS)],
        )


def main() -> int:
    """Measure, print, write fleet.json. Return 1 if the bar is missed."""
    chosen = _arguments()
    machine = report.machine()
    rows = [measure(count, chosen.rounds) for count in chosen.sizes]
    print(f"\n{report.machine_line(machine)}; {chosen.rounds} rounds each, {EACH} replicas each\n")
    print(table(rows))
    verdicts = judge(rows)
    print("\n" + "\n".join(f"{verdict}  {text}" for verdict, text in verdicts))
    out: Path = chosen.out / "fleet.json"
    report.write_json(out, {"machine": machine, "rows": rows, "bars": verdicts})
    print(f"\nResults: {out}")
    return 1 if any(verdict == "MISS" for verdict, _ in verdicts) else 0


def measure(count: int, rounds: int) -> dict[str, Any]:
    """Return the times of a round over ``count`` Deployments, in ms."""
    print(f"{count:,} Deployments, {count * EACH:,} replicas", flush=True)
    world = fleet(count)
    with tempfile.TemporaryDirectory(prefix="tidegate-bench-") as folder:
        history = Recordings(Path(folder) / "history.db", 2**30)
        times, decided, size = asyncio.run(_rounds(world, history, rounds))
        history.close()
    return {
        "deployments": count,
        "replicas": count * EACH,
        "decisions": decided,
        "recorded_bytes": size,
        **{f"{name}_ms": median(values) * 1e3 for name, values in times.items()},
        "round_p99_ms": sorted(map(sum, zip(*times.values(), strict=True)))[int(rounds * 0.99)] * 1e3,
    }


async def _rounds(world: World, history: Recordings, rounds: int) -> tuple[dict[str, list[float]], int, int]:
    policy, state, shown = Policy(), State(), dict[str, DeploymentStatus]()
    recorder = Recorder(history, policy, observations=True)
    times: dict[str, list[float]] = {"decide": [], "status": [], "record": []}
    decided, snapshots, now = 0, world.snapshots(), START
    gc.freeze()
    for number in range(WARM + rounds):
        snapshot, before, now = next(snapshots), state, now + PERIOD_S
        begun = time.perf_counter()
        plan, state = decide(snapshot, policy, before, now)
        after = time.perf_counter()
        shown = statuses(snapshot, state, shown, {}, now)
        told = time.perf_counter()
        recorder.note(before, snapshot, plan, state, now)
        kept = time.perf_counter()
        world.act(plan)
        await asyncio.sleep(0)
        if number >= WARM:
            decided += len(plan.decisions)
            for name, spent in (
                ("decide", after - begun), ("status", told - after), ("record", kept - told)
            ):  # fmt: skip
                times[name].append(spent)
    await recorder.flush(now)
    assert history.span() is not None, "nothing was recorded"
    return times, decided, history.path.stat().st_size


def fleet(count: int) -> World:
    """Return ``count`` Deployments of different models, with their Endpoints and replicas."""
    deployments, versions, endpoints = [], [], []
    running = []
    for number in range(count):
        model, name = f"m{number:05}", f"m{number:05}-v1"
        deployment = Deployment(
            name=name, model=model, version=1, min_replicas=1, max_replicas=20, revision=1, created_at=BORN
        )
        deployments.append(deployment)
        versions.append(
            Version(
                model=model,
                number=1,
                format="onnx",
                artifact_sha256="0" * 64,
                artifact_size=1,
                filename="model.onnx",
                created_at=BORN,
            )
        )
        endpoints.append(Endpoint(name=model, targets=[Target(deployment=name)], revision=1))
        running += [replica(deployment, slot, 1) for slot in range(EACH)]
    desired_state = DesiredState(revision=1, versions=versions, deployments=deployments, endpoints=endpoints)
    return World(desired_state, {each.replica: each for each in running})


def replica(deployment: Deployment, slot: int, generation: int) -> Running:
    """Return a running replica."""
    name = replica_name(deployment.name, slot, generation)
    return Running(name, deployment.name, slot, generation, 1, True, START, fingerprint(deployment))


def judge(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return the bars: the time of a round at 1,000 Deployments, and its growth with the fleet."""
    verdicts = []
    for row in rows:
        if row["deployments"] == LIMIT_AT:
            spent = row["round_p99_ms"] / 1e3
            text = f"{LIMIT_AT:,} Deployments: a round takes {spent:.2f} s (p99), at most {LIMIT_S:g} s"
            verdicts.append(("PASS" if spent <= LIMIT_S else "MISS", text))
    first, last = rows[0], rows[-1]
    if last["deployments"] >= 4 * first["deployments"]:
        grown = last["decide_ms"] / first["decide_ms"]
        by = last["deployments"] / first["deployments"]
        text = f"{by:g} times the fleet takes {grown:.1f} times as long to decide, at most {1.5 * by:g}"
        verdicts.append(("PASS" if grown <= 1.5 * by else "MISS", text))
    return verdicts


def table(rows: list[dict[str, Any]]) -> str:
    """Print the figures by size."""
    head = ["Deployments", "replicas", "decide ms", "statuses ms", "record ms", "round p99 ms", "decisions"]
    keys = ("decide_ms", "status_ms", "record_ms", "round_p99_ms")
    lines = [
        [
            f"{row['deployments']:,}",
            f"{row['replicas']:,}",
            *(f"{row[key]:.1f}" for key in keys),
            f"{row['decisions']:,}",
        ]
        for row in rows
    ]
    return report.table(head, lines)


def _arguments() -> argparse.Namespace:
    parser = options.parser(__doc__)
    parser.add_argument(
        "--sizes",
        type=options.numbers,
        default=[100, 250, 500, 1000, 2000],
        help="Deployments, comma-separated",
    )
    parser.add_argument("--rounds", type=int, default=40, help="measured rounds of each (default: 40)")
    return parser.parse_args()


if __name__ == "__main__":
    session.run(main)
