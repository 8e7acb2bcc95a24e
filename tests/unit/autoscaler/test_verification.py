"""Scratch replicas: which start, what their outcomes mean, and when a version is rejected."""

from __future__ import annotations

from dataclasses import replace

import pytest

from services.autoscaler.domain.capacity import ReplicaSize, size_of
from services.autoscaler.domain.cold_start import start_time
from services.autoscaler.domain.desired_state import index_of
from services.autoscaler.domain.launcher import (
    LaunchFailed,
    NoFreeGpu,
    OptionsRefused,
    Running,
    parse_replica,
    replica_name,
)
from services.autoscaler.domain.load import with_guess
from services.autoscaler.domain.memory import Load, State
from services.autoscaler.domain.snapshot import Host, Policy
from services.autoscaler.domain.verification import (
    AT_ONCE,
    LONGEST_BACKOFF_S,
    Attempts,
    after_failed_launch,
    deployment_of_scratch,
    fits,
    is_scratch,
    obstacle,
    plan,
    scratch_of,
)
from tests.unit.autoscaler.conftest import BORN, a_deployment, a_version
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol.models import Assignment, DesiredState, Version
from tidegate.kernel.protocol.presence import ReplicaReport
from tidegate.kernel.protocol.verification import BatchFigures, CapacityCard, Verification

NOW = 1_000.0
CARD = CapacityCard(requests_per_s=400.0, memory_mb=180, start_s=2.5, measured_at=BORN)


def pending(number: int = 1, round_: int = 1) -> Version:
    found = Verification(state="pending", round=round_)
    return a_version().model_copy(update={"number": number, "verification": found})


def scratch(number: int = 1, generation: int = 1, **given) -> Running:
    name = deployment_of_scratch("digits", number)
    replica = replica_name(name, 0, generation)
    return replace(Running(replica, name, 0, generation, 1, True, NOW - 1.0), **given)


def report(running: Running, kind: str | None, message: str = "", round_: int = 1) -> ReplicaReport:
    outcome = None if kind is None else {"round": round_, "kind": kind, "message": message}
    return ReplicaReport(
        running.replica, running.deployment, running.generation, "h", 1, "starting", scratch=outcome
    )


def outcome_of(kind: str | None, kept: Attempts | None = None, message: str = "", **given):
    running = scratch(**given)
    reports = {} if kind is None else {running.replica: report(running, kind, message)}
    memory = {("digits", 1): kept} if kept else {}
    return plan([pending()], [running], reports, memory, NOW, reported={running.replica})


def test_the_name_of_a_scratch_replica_gives_its_version_back():
    for model, number in (("digits", 1), ("a-b.c-2", 17)):
        name = deployment_of_scratch(model, number)
        assert scratch_of(name) == (model, number)
        assert parse_replica(replica_name(name, 0, 3)) == (name, 0, 3)
        assert is_scratch(replica_name(name, 0, 3))
    for other in ("digits-v1", "warm-cpu-", "scratch-digits-v1", "scratch--"):
        assert scratch_of(other) is None
        assert not is_scratch(replica_name(other, 0, 3))
    assert not is_scratch(""), "a replica that came from nowhere else"


def test_a_pending_version_gets_one_scratch_replica_and_only_a_few_start_at_once():
    versions = [pending(number) for number in range(1, 6)]
    found = plan(versions, [], {}, {}, NOW)
    assert [version.number for version in found.launch] == list(range(1, AT_ONCE + 1))
    running = [scratch(1)]
    found = plan(versions, running, {running[0].replica: report(running[0], None)}, {}, NOW)
    assert [version.number for version in found.launch] == [2]
    assert not found.kill


@pytest.mark.parametrize("kind", ["verified", "rejected"])
def test_an_outcome_settles_the_version_and_ends_its_scratch_replica(kind):
    found = outcome_of(kind, message="Triton says no")
    ((settled,), ((replica, _),)) = found.settle, found.kill
    assert (settled.model, settled.number, settled.result.state) == ("digits", 1, kind)
    assert settled.result.message == "Triton says no"
    assert replica == scratch().replica
    assert not found.launch


def test_a_model_that_dies_twice_is_rejected_and_not_before():
    first = outcome_of("died", message="the model's process ended (signal 9, out of memory?)")
    assert not first.settle
    assert first.kill
    kept = first.attempts["digits", 1]
    assert kept.not_before > NOW
    second = outcome_of("died", kept, "the model's process ended (signal 9, out of memory?)")
    (settled,) = second.settle
    assert settled.result.state == "rejected"
    assert "signal 9, out of memory?" in settled.result.message


def test_a_scratch_replica_that_the_machine_killed_is_tried_again():
    kept = None
    for _ in range(2):
        found = outcome_of(None, kept, alive=False, ending="the worker was ended by SIGKILL")
        assert not found.settle
        kept = found.attempts["digits", 1]
        later = plan([pending()], [], {}, found.attempts, kept.not_before)
        assert len(later.launch) == 1
    (settled,) = outcome_of(None, kept, alive=False, ending="the worker was ended by SIGKILL").settle
    assert settled.result.state == "rejected"
    assert "SIGKILL" in settled.result.message


def test_a_container_that_reached_its_memory_limit_counts_as_a_death_of_the_model():
    found = outcome_of(None, alive=False, out_of_memory=True, ending="exit code 137")
    assert found.attempts["digits", 1].deaths == 1


def test_scratch_replicas_of_versions_that_are_not_pending_end_and_a_new_round_starts_afresh():
    assert plan([], [scratch()], {}, {}, NOW).kill
    kept = {("digits", 1): Attempts(1, deaths=1, not_before=NOW + 60)}
    assert plan([pending(round_=2)], [], {}, kept, NOW).launch
    late = scratch()
    found = plan([pending(round_=2)], [late], {late.replica: report(late, "rejected")}, {}, NOW)
    assert not found.settle, "the outcome is of an earlier round"
    assert found.kill


def test_a_silent_scratch_replica_is_ended():
    assert not outcome_of(None, launched_at=NOW - 20).kill
    assert outcome_of(None, launched_at=NOW - 40).kill


def test_a_scratch_replica_without_a_free_gpu_skips_the_verification():
    kept, result = None, None
    for _ in range(3):
        assert result is None
        kept, result = after_failed_launch(pending(), kept, NoFreeGpu("no room"), NOW)
    assert result is not None
    assert (result.state, "no room" in result.message) == ("skipped", True)


def test_options_that_the_launcher_does_not_have_reject_at_once():
    _, result = after_failed_launch(pending(), None, OptionsRefused("no images here"), NOW)
    assert result is not None
    assert (result.state, result.message) == ("rejected", "no images here")


@pytest.mark.parametrize("error", [Unavailable("the engine is away"), LaunchFailed("the engine refuses")])
def test_a_launcher_that_fails_never_rejects_and_is_called_less_and_less_often(error):
    kept, pauses = None, []
    for _ in range(40):
        kept, result = after_failed_launch(pending(), kept, error, NOW)
        assert result is None
        pauses.append(kept.not_before - NOW)
    assert pauses[:4] == [1.0, 2.0, 4.0, 8.0]
    assert pauses[-1] == LONGEST_BACKOFF_S
    assert kept is not None
    assert (kept.outages, kept.message) == (40, error.message)
    found = outcome_of("died", kept, "signal 9")
    assert not found.settle, "the outages are not deaths of the model"


def test_failures_before_the_model_is_loaded_never_reject():
    fetch, dead, silent = None, None, None
    for _ in range(10):
        found = outcome_of("unavailable", fetch, "the artifact cannot be fetched: the registry is away")
        assert not found.settle
        fetch = found.attempts["digits", 1]
        one, late = scratch(alive=False, ending="exit code 1"), scratch(launched_at=NOW - 40)
        found = plan([pending()], [one], {}, {("digits", 1): dead} if dead else {}, NOW)
        assert not found.settle, "it had no heartbeat, so no model ran"
        dead = found.attempts["digits", 1]
        found = plan([pending()], [late], {}, {("digits", 1): silent} if silent else {}, NOW)
        assert not found.settle
        silent = found.attempts["digits", 1]
    assert [kept and kept.outages for kept in (fetch, dead, silent)] == [10, 10, 10]


def test_no_scratch_replica_starts_on_a_full_or_cordoned_host():
    policy, deployment = Policy(host_memory=0.9), a_deployment(resources={"memory_mb": 500})
    assert not obstacle(deployment, Host(2, 1000, 600), policy, cordoned=False)
    assert "500 MiB" in obstacle(deployment, Host(2, 1000, 599), policy, cordoned=False)
    assert "cordoned" in obstacle(deployment, Host(2, 1000, 600), policy, cordoned=True)
    assert not obstacle(deployment, None, policy, cordoned=False)


def verified() -> Version:
    found = Verification(state="verified", round=1, card=CARD)
    return a_version().model_copy(update={"verification": found})


def test_the_capacity_card_is_the_first_estimate_of_throughput_memory_and_start():
    load = Load(demand=40, new=0, arrival_rate=0.0, ms_per_request=None, batch=1.0)
    assert with_guess(load, verified()).ms_per_request == 2.5
    tuned = verified()
    tuned.metadata.metrics["capacity_rps"] = 500.0
    assert with_guess(load, tuned).ms_per_request == 2.0, "what tune measured comes first"
    fuller = CARD.model_copy(
        update={
            "batches": [
                BatchFigures(rows=rows, p50_ms=1, p99_ms=2, rows_per_s=rate)
                for rows, rate in ((1, 100.0), (8, 200.0), (64, 400.0))
            ]
        }
    )
    assert fuller.expected_rps == 200.0, "calls of a new replica seldom have more rows"
    size = ReplicaSize(180.0, 1.0, "measured during the version's verification")
    assert size_of(a_deployment(), 0, Policy(), verified()) == size
    assert size_of(a_deployment(), 90, Policy(), verified()).memory_mb == 90
    state = DesiredState(revision=1, versions=[verified()], deployments=[a_deployment()])
    first = index_of(state).start_times(state.deployments)
    assert start_time(State(first_starts=first), "digits-v1") == 2.5
    assert start_time(State(first_starts=first, starts={"digits-v1": (1.0,)}), "digits-v1") == 1.0


def test_a_kept_scratch_replica_becomes_only_a_replica_of_its_version_with_its_resources():
    def assignment(**given) -> Assignment:
        return Assignment(
            replica="r-0-1",
            generation=1,
            deployment=a_deployment(**given),
            version=a_version(),
            launched_at=NOW,
        )

    scratch_of_version = assignment(name="scratch")
    assert fits(scratch_of_version, assignment(threads=2, env={"A": "1"})), (
        "its Triton starts again for these"
    )
    assert not fits(scratch_of_version, assignment(version=2))
    assert not fits(scratch_of_version, assignment(resources={"memory_mb": 900}))
    assert not fits(scratch_of_version, assignment(image="ours/worker:7"))
