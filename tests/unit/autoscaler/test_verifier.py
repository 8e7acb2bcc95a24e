"""The verifier acts on the plans: outcomes count once, and a verified scratch replica is kept for a while."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from services.autoscaler.application.verifier import BUSY_PERIOD_S, KEEP_S, KEPT_PERIOD_S, Verifier
from services.autoscaler.domain.launcher import Running, parse_replica
from services.autoscaler.domain.snapshot import Host, Policy
from services.autoscaler.domain.verification import SILENT_S
from tests.unit.autoscaler.conftest import a_version
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol.models import DeploymentSpec, DesiredState, Version
from tidegate.kernel.protocol.presence import ReplicaReport
from tidegate.kernel.protocol.verification import ScratchTask, Verification, VerificationResult
from tidegate.kernel.store import StoreUnavailable

START = 1_000.0


class World:
    """Everything around a verifier: launcher, warm pool, store, registry, in memory."""

    def __init__(self) -> None:
        self.now = START
        self.version: Version = a_version().model_copy(
            update={"verification": Verification(state="pending", round=1)}
        )
        self.others: list[Version] = []
        self.running: dict[str, Running] = {}
        self.reports: dict[str, ReplicaReport] = {}
        self.results: list[VerificationResult] = []
        self.kept: list[str] = []
        self.replicas_now: set[str] = set()
        self.kill_fails = False
        self.launch_error: Exception | None = None
        self.full = False
        self.answered = True
        self.store_away = False

    # the launcher
    async def launch(self, assignment: Any) -> None:
        if self.launch_error is not None:
            raise self.launch_error
        name, slot, generation = parse_replica(assignment.replica) or ("", 0, 0)
        self.running[assignment.replica] = Running(
            assignment.replica, name, slot, generation, 1, True, self.now
        )

    async def kill(self, replica: str) -> None:
        if self.kill_fails:
            raise Unavailable("its processes do not die")
        self.running.pop(replica)

    async def list(self) -> list[Running]:
        return list(self.running.values())

    # the warm pool
    def keep_verified(self, scratch: Any) -> None:
        self.kept.append(scratch.replica)

    def release_verified(self, worker: str) -> bool:
        return worker not in self.replicas_now

    def became_replica(self, worker: str) -> bool:
        return worker in self.replicas_now

    # the store
    async def replicas(self) -> Any:
        if self.store_away:
            raise StoreUnavailable("the store does not answer")
        return list(self.reports.values())

    async def forget_replica(self, replica: str) -> None:
        self.reports.pop(replica, None)

    # the registry and its desired state
    async def verification_task(self, model: str, number: int) -> Any:
        return DeploymentSpec(name="scratch", model=model, version=number), ScratchTask(round=1)

    async def put_verification(self, model: str, number: int, result: VerificationResult) -> None:
        if not self.answered:
            raise Unavailable("The registry does not answer.")
        self.results.append(result)

    @property
    def current(self) -> DesiredState:
        return DesiredState(revision=1, versions=[self.version, *self.others])

    def refresh_soon(self) -> None:
        pass

    # the rest
    def generations(self) -> dict[tuple[str, int], int]:
        return {}

    def save_generation(self, name: str, slot: int, generation: int) -> None:
        pass

    def launching(self, replica: str, sha256: str) -> None:
        pass

    async def read(self) -> Host:
        return Host(2, 1000, 10 if self.full else 900)

    def reports_outcome(self, kind: str, message: str = "", version: int = 1) -> str:
        ((replica, running),) = (
            item for item in self.running.items() if item[1].deployment == f"scratch-digits-{version}-"
        )
        outcome = {"round": 1, "kind": kind, "message": message, "card": None}
        self.reports[replica] = ReplicaReport(
            replica, running.deployment, running.generation, "h", 1, "starting", scratch=outcome
        )
        return replica


class Checked:
    """A verifier in a world, and the checks of it."""

    def __init__(self) -> None:
        world: Any = World()
        self.world: World = world
        self.verifier = Verifier(
            world, world, world, world, world, world, world, world, Policy(), lambda: False, lambda: world.now
        )

    def check(self, after_s: float = 0.0) -> None:
        self.world.now += after_s
        asyncio.run(self.verifier.check())


@pytest.fixture
def checked() -> Checked:
    found = Checked()
    found.check()
    assert list(found.world.running) == ["scratch-digits-1--0-1"]
    return found


def test_a_death_counts_once_even_if_the_process_cannot_be_ended(checked: Checked):
    world = checked.world
    world.reports_outcome("died", "signal 9")
    world.kill_fails = True
    for _ in range(3):
        with pytest.raises(Unavailable):
            checked.check(0.2)
    assert not world.results, "it died once"
    world.kill_fails = False
    checked.check(2.0)
    checked.check(0.0)
    assert list(world.running) == ["scratch-digits-1--0-2"]
    world.reports_outcome("died", "signal 9")
    checked.check(1.0)
    (result,) = world.results
    assert (result.state, "signal 9" in result.message) == ("rejected", True)


def test_a_verified_scratch_replica_is_kept_for_the_first_replica_and_then_ended(checked: Checked):
    world = checked.world
    replica = world.reports_outcome("verified")
    checked.check(1.0)
    assert [result.state for result in world.results] == ["verified"]
    assert world.kept == [replica]
    checked.check(KEEP_S - 1)
    assert replica in world.running
    checked.check(2.0)
    assert not world.running


def test_a_scratch_replica_that_became_a_replica_is_never_ended(checked: Checked):
    world = checked.world
    replica = world.reports_outcome("verified")
    checked.check(1.0)
    world.replicas_now.add(replica)
    for _ in range(3):
        checked.check(KEEP_S)
    assert replica in world.running


def test_a_result_is_written_when_the_registry_answers_again(checked: Checked):
    world = checked.world
    world.reports_outcome("rejected", "no")
    world.answered = False
    with pytest.raises(Unavailable):
        checked.check(1.0)
    assert world.running, "its report is still needed"
    world.answered = True
    checked.check(1.0)
    assert [result.message for result in world.results] == ["no"]
    assert not world.running


def test_outcomes_count_once_while_the_registry_does_not_answer(checked: Checked):
    world = checked.world
    world.others = [world.version.model_copy(update={"number": 2})]
    checked.check(1.0)
    world.reports_outcome("rejected", "no", 1)
    world.reports_outcome("died", "signal 9", 2)
    world.answered = False
    for _ in range(4):
        with pytest.raises(Unavailable):
            checked.check(0.1)
    world.answered = True
    checked.check(10.0)
    assert [result.message for result in world.results] == ["no"], "version 2 died once"
    checked.check(1.0)
    assert list(world.running) == ["scratch-digits-2--0-2"]
    world.reports_outcome("died", "signal 9", 2)
    world.answered = False
    for _ in range(4):
        with pytest.raises(Unavailable):
            checked.check(1.0)
    world.answered = True
    checked.check(1.0)
    assert world.results[-1].message == "After 2 tries: signal 9"


def test_an_outage_of_the_store_is_not_the_silence_of_a_scratch_replica(checked: Checked):
    world = checked.world
    replica = "scratch-digits-1--0-1"
    world.reports[replica] = ReplicaReport(replica, "scratch-digits-1-", 1, "h", 1, "starting")
    checked.check(SILENT_S)
    world.store_away = True
    with pytest.raises(StoreUnavailable):
        checked.check(SILENT_S * 2)
    world.store_away = False
    world.reports.clear()  # its heartbeat has expired meanwhile
    checked.check(1.0)
    checked.check(SILENT_S - 2)
    assert replica in world.running
    checked.check(4.0)
    assert replica not in world.running


def test_nothing_is_noted_about_a_scratch_replica_that_became_a_replica(checked: Checked):
    world, verifier = checked.world, checked.verifier
    replica = world.reports_outcome("verified")
    checked.check(1.0)
    world.replicas_now.add(replica)
    checked.check(1.0)
    assert [verifier._started, verifier._kept, verifier._granted, verifier._ending] == [{}] * 4


def test_a_version_waits_on_a_full_host_and_says_why():
    found = Checked()
    found.world.full = True
    found.check()
    assert not found.world.running
    (shown,) = found.verifier.view()
    assert "MiB free" in shown["step"]
    assert found.verifier.pause_s() == KEPT_PERIOD_S, "waiting for room must not keep the registry busy"
    found.world.full = False
    found.check(1.0)
    assert found.world.running
    assert found.verifier.pause_s() == BUSY_PERIOD_S


@pytest.mark.parametrize("error", [Unavailable("It does not answer."), OSError("It does not answer.")])
def test_a_version_waits_while_the_launcher_is_away_and_says_why(error: Exception):
    found = Checked()
    found.world.launch_error = error
    for tries in range(1, 8):
        found.check(60.0)
        (shown,) = found.verifier.view()
        assert (shown["failed_tries"], "does not answer" in shown["step"]) == (tries, True)
    assert found.verifier.pause_s() == KEPT_PERIOD_S
    assert not found.world.results
    found.world.launch_error = None
    found.check(60.0)
    found.world.reports_outcome("verified")
    found.check(1.0)
    assert [result.state for result in found.world.results] == ["verified"]


def test_the_scratch_replica_of_a_deleted_version_ends(checked: Checked):
    version = checked.world.version
    checked.world.version = version.model_copy(update={"verification": Verification()})
    checked.check(1.0)
    assert not checked.world.running
