"""Test how dead, failed, hanging and outdated replicas are replaced, in simulated time."""

from __future__ import annotations

from services.autoscaler.domain.launcher import Running
from services.autoscaler.domain.memory import State

NAME = "digits-v1"


def test_a_dead_worker_is_replaced_in_the_same_round(make_world, deployment):
    world = make_world(deployment())
    world.run(10)
    world.die("digits-v1-0-1", ending="the worker was ended by SIGKILL")
    world.round()
    assert world.killed[-1][1:] == ("digits-v1-0-1", "died"), "its Triton is ended first"
    assert world.names() == ["digits-v1-0-2"]
    assert "SIGKILL" in world.decisions[-1].reason


def test_a_crash_loop_backs_off_up_to_a_minute_and_says_so(make_world, deployment):
    world = make_world(deployment(), start_s=0.5)
    world.run(5)
    gaps = []
    for _ in range(10):
        while not (alive := world.names()):
            world.run(0.5)
        while world.workers[alive[0]].ready_at > world.now:
            world.run(0.5)
        world.run(1)
        died = world.now
        world.die(alive[0], "out of memory")
        launched = len(world.launched)
        while len(world.launched) == launched:
            world.run(0.5)
        gaps.append(world.launched[-1][0] - died)
    assert gaps[:7] == [0, 1, 2, 4, 8, 16, 32]
    assert max(gaps) == 60
    assert world.condition("Healthy").reason == "CrashLoop"
    assert "out of memory" in world.condition("Healthy").message
    world.run(120)
    world.die(world.names()[0])
    world.round()
    assert len(world.names()) == 1, "after a minute of being ready it is replaced immediately again"


def test_two_that_die_together_are_both_replaced_at_once(make_world, deployment):
    world = make_world(deployment(min_replicas=2, max_replicas=2))
    world.run(10)
    for name in world.names():
        world.die(name)
    world.round()
    assert world.names() == ["digits-v1-0-2", "digits-v1-1-2"]


def test_a_failing_load_is_retried_patiently_and_its_message_shown(make_world, deployment):
    world = make_world(deployment(min_replicas=3, max_replicas=3))
    world.fail_load = "failed to load 'digits': Invalid model file"
    world.run(2)
    loaded = world.condition("Loaded")
    assert (loaded.ok, loaded.reason) == (False, "LoadFailed")
    assert "Invalid model file" in loaded.message
    world.run(60)
    # 3 at once, then one at a time after 1, 2, 4, 8, 16, 32 s.
    assert len(world.launched) <= 9
    world.fail_load = ""
    world.run(70)
    assert len(world.names()) == 3
    assert world.condition("Loaded").ok


def test_a_changed_configuration_gets_its_chance_at_once(make_world, deployment):
    world = make_world(deployment())
    world.fail_load = "no such option"
    world.run(40)
    world.fail_load = ""
    world.deployments = [deployment(env={"OPTION": "1"})]
    world.run(1)
    assert len(world.names()) == 1
    world.run(4)
    assert world.condition("Loaded").ok


def test_a_launch_that_fails_is_not_retried_hot(make_world, deployment):
    world = make_world(deployment())
    world.fail_launch = "no space left on device"
    world.run(30)
    assert len(world.launched) <= 6
    assert world.condition("Loaded").reason == "LaunchFailed"
    assert "no space left" in world.condition("Loaded").message


def test_never_ready_ends_at_the_start_timeout(make_world, deployment):
    world = make_world(deployment(start_timeout_s=20), start_s=1e9)
    world.run(25)
    assert world.killed == [], "the worker can report the reason first"
    world.run(2)
    assert world.killed[0][1:] == ("digits-v1-0-1", "start timeout")
    assert world.condition("Loaded").reason == "StartTimeout"


def test_a_stuck_worker_is_replaced_only_while_others_report(make_world, deployment):
    world = make_world(deployment(min_replicas=2, max_replicas=2))
    world.run(10)
    world.workers["digits-v1-1-1"].silent = True
    world.run(14)
    assert world.killed == []
    world.run(3)
    assert world.killed[0][1:] == ("digits-v1-1-1", "stuck")


def test_a_store_that_is_away_or_comes_back_empty_kills_nobody(make_world, deployment):
    world = make_world(deployment(min_replicas=2, max_replicas=2, start_timeout_s=20))
    world.run(10)
    world.store_up = False
    world.run(300)
    assert world.killed == []
    assert len(world.names()) == 2
    world.store_up = True
    for worker in world.workers.values():
        worker.silent = True
    world.run(10)
    for worker in world.workers.values():
        worker.silent = False
    world.run(60)
    assert world.killed == []


def test_an_overdue_drain_is_ended(make_world, deployment):
    world = make_world(deployment(min_replicas=2, max_replicas=2, drain_limit_s=10))
    world.run(5)
    world.drain_s = 1e9
    world.deployments = [deployment(drain_limit_s=10)]
    world.run(20)
    assert world.killed == []
    world.run(2)
    assert world.killed[0][2] == "drain overdue"


def test_a_deleted_deployment_is_drained_but_an_unread_registry_deletes_nothing(make_world, deployment):
    world = make_world(deployment(), deployment(name="other-v1"))
    world.run(5)
    world.desired_state_known = False
    world.run(60)
    assert len(world.names()) == len(world.names("other-v1")) == 1
    world.desired_state_known = True
    world.deployments = [deployment()]
    world.run(3)
    assert world.names("other-v1") == []
    assert len(world.names()) == 1
    assert world.killed[-1][2] == "drained"


def test_a_changed_configuration_rolls_without_a_gap(make_world, deployment):
    world = make_world(deployment(min_replicas=3, max_replicas=3))
    world.run(10)
    world.deployments = [deployment(min_replicas=3, max_replicas=3, threads=2)]
    for _ in range(60):
        world.round()
        world.now += 0.5
        assert world.statuses[NAME].ready >= 3
        assert len(world.names()) <= 4
    assert len(world.names()) == 3
    assert not {"digits-v1-0-1", "digits-v1-1-1", "digits-v1-2-1"} & set(world.names())
    assert world.condition("Current").ok


def test_an_autoscaler_that_restarts_adopts_everything(make_world, deployment):
    world = make_world(deployment(max_replicas=8))
    world.call_ms = 20.0
    world.outstanding[NAME] = 40
    world.run(10)
    before = world.names()
    assert len(before) == 4
    world.state = State()
    world.outstanding[NAME] = 1
    world.run(20)
    assert world.names() == before
    assert world.killed == []


def test_generations_survive_a_restart_by_what_was_kept_and_by_what_is_seen(make_world, deployment):
    world = make_world(deployment())
    world.state = State(generations={(NAME, 0): 7})
    world.run(1)
    assert world.names() == ["digits-v1-0-8"]
    remains = Running("digits-v1-0-12", NAME, 0, 12, 0, False, world.now)
    other = make_world(deployment())
    other.workers["digits-v1-0-12"] = type(next(iter(world.workers.values())))(remains, 0.0, silent=True)
    other.run(1)
    assert other.names() == ["digits-v1-0-13"]


def test_a_restarted_autoscaler_still_knows_why_a_load_failed(make_world, deployment):
    world = make_world(deployment(min_replicas=0))
    world.fail_load = "Invalid model file"
    world.run(2)
    reports = {r.replica: r for r in world.reports()} or None
    world.round()
    again = make_world(deployment(min_replicas=0))
    again.state = State(generations=dict(world.state.generations))
    if reports:
        again.reports = lambda: list(reports.values())
        again.round()
        assert "Invalid model file" in again.condition("Loaded").message


def test_installing_requirements_is_no_part_of_the_start(make_world, deployment):
    world = make_world(deployment(start_timeout_s=20), start_s=1000.0)
    world.run(1)
    (name,) = world.names()
    for _ in range(60):
        world.workers[name].phases_ms = {"environment": (world.now - world.launched[0][0]) * 1000}
        world.run(1)
    assert world.names() == [name], "the downloads take a minute"
    world.run(20)
    assert world.names() == [name]
    world.run(10)
    assert [cause for _, _, cause in world.killed] == ["start timeout"]
