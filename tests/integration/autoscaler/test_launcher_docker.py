"""Test the docker launcher on a real engine. Tests of all launchers are in test_launchers.py."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from services.autoscaler.adapters.docker.engine import Engine
from services.autoscaler.adapters.docker.launcher import DockerLauncher
from services.autoscaler.domain.engine_rules import CAPABILITIES
from services.autoscaler.domain.gpus import Gpu
from services.autoscaler.domain.launcher import LaunchFailed, pool_fingerprint
from tests.conftest import PATIENCE_S
from tests.integration.autoscaler.container_harness import HOME, api, image
from tests.integration.autoscaler.test_launchers import gone
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol import replica_token
from tidegate.kernel.protocol.warm_pool import WarmAssignment, WarmPoolSpec

ONE, TWO, THREE = "digits-v1-0-1", "digits-v1-1-1", "digits-v1-2-1"
WAITS = "warm-cpu--0-1"
# Injected, because test machines have no GPUs. The claims on them are real.
BIG, SMALL = Gpu("GPU-big", 80_000), Gpu("GPU-small", 16_000)


@pytest.fixture
def harness(containers):
    return containers


async def test_limits_labels_and_what_a_container_may_do(harness, assign):
    launcher = harness.launcher(
        memory_mb=512, cpus=0.5, shm_mb=96, log_options={"max-size": "1m"}, compose_project="stack"
    )
    await launcher.launch(assign(ONE, drain_limit_s=42))
    await launcher.launch(assign(TWO, resources={"memory_mb": 256, "cpus": 0.25, "shm_mb": 32}))
    found, own = harness.inspect(ONE), harness.inspect(TWO)["HostConfig"]
    host = found["HostConfig"]
    assert (host["Memory"], host["MemorySwap"]) == (512 * 2**20, 512 * 2**20)
    assert (host["NanoCpus"], host["ShmSize"]) == (500_000_000, 96 * 2**20)
    assert (own["Memory"], own["NanoCpus"], own["ShmSize"]) == (256 * 2**20, 250_000_000, 32 * 2**20)
    assert host["RestartPolicy"]["Name"] == "no"
    assert host["CapDrop"] == ["ALL"]
    assert {name.removeprefix("CAP_") for name in host["CapAdd"]} == set(CAPABILITIES)
    assert found["Config"]["User"] == "0:0"
    assert host["SecurityOpt"] == ["no-new-privileges"]
    assert host["LogConfig"] == {"Type": "json-file", "Config": {"max-size": "1m"}}
    assert not host["Privileged"]
    assert not host["Binds"]
    assert found["Config"]["StopTimeout"] == 52
    labels = found["Config"]["Labels"]
    assert labels["com.docker.compose.project"] == "stack"
    assert labels["com.docker.compose.service"] == "replica"
    assert labels["tidegate.image-digest"] == (await one_of(launcher, ONE)).image
    known = api().inspect_image(image())
    assert labels["tidegate.image-digest"] in [known["Id"], *known["RepoDigests"]]


async def test_one_that_waits_is_out_of_date_once_workers_are_started_otherwise(harness, assign):
    """It must equal a worker that starts now, because it will become a replica."""
    given = WarmAssignment(
        replica=WAITS, generation=1, pool_name="cpu", pool=WarmPoolSpec(), launched_at=time.time()
    )
    launcher = harness.launcher()
    await launcher.launch(given)
    await launcher.launch(assign(ONE))
    assert harness.inspect(WAITS)["Config"]["StopTimeout"] == 610
    assert (await one_of(launcher, WAITS)).fingerprint == pool_fingerprint(given.pool)
    other = harness.launcher(memory_mb=512)
    assert (await one_of(other, WAITS)).fingerprint == ""
    assert (await one_of(other, ONE)).fingerprint == (await one_of(launcher, ONE)).fingerprint != ""


async def one_of(launcher, replica):
    return next(each for each in await launcher.list() if each.replica == replica)


async def test_no_secret_can_be_read_at_the_engine(harness, assign):
    """Token, passwords and assignment are files, because a Deployment's environment may have secrets."""
    launcher = harness.launcher(secrets={"rabbitmq/worker": b"pass-word"})
    await launcher.launch(assign(ONE, env={"API_PASSWORD": "sesame"}))
    harness.until_up(ONE)
    shown = json.dumps(harness.inspect(ONE))
    mine = replica_token.issue("the-token", ONE)
    for secret in ("the-token", mine, "pass-word", "sesame"):
        assert secret not in shown
    assert f"TIDEGATE_SECRETS_DIR={HOME}/secrets" in shown
    files = ("replica/token", "secrets/rabbitmq/worker", "replica/assignment.json")
    read = f"cd {HOME}; cat {' '.join(files)}; ls -ln {' '.join(files)}; ls"
    started = api().exec_create(harness.name(ONE), ["sh", "-c", read])["Id"]
    said = api().exec_start(started).decode()
    for secret in (mine, "pass-word", "sesame"):
        assert secret in said
    assert said.count("-r--------") == len(files)
    # The service token gives access to everything, so a worker never has it.
    assert "the-token" not in said


async def test_out_of_memory_is_told_as_such(harness, assign):
    launcher = harness.launcher("greedy", memory_mb=64)
    await launcher.launch(assign(ONE))
    found = await gone(launcher)
    assert found.out_of_memory
    assert "out of memory" in found.ending
    assert "64 MiB" in found.ending


async def test_an_image_that_is_not_there_fails_the_launch_and_frees_the_name(harness, assign):
    launcher = harness.launcher()
    with pytest.raises(LaunchFailed, match="no image tidegate/nowhere:1"):
        await launcher.launch(assign(ONE, image="tidegate/nowhere:1"))
    assert await launcher.list() == []


async def test_fetching_an_image_does_not_hold_up_the_launcher(harness, assign):
    """The pull runs in the background. The next launch reports the error of the image registry."""
    launcher = harness.launcher(pull="missing")
    work = assign(ONE, image="127.0.0.1:1/tidegate/nowhere:1")
    with pytest.raises(LaunchFailed, match="is being pulled"):
        await launcher.launch(work)

    async def image_missing_reported():
        try:
            await launcher.launch(work)
        except LaunchFailed as error:
            return "is missing" in error.message and "127.0.0.1:1" in error.message

    async with asyncio.timeout(PATIENCE_S):
        while not await image_missing_reported():
            await asyncio.sleep(0.1)
    assert await launcher.list() == []


async def test_a_start_that_the_engine_refuses_leaves_nothing(harness, assign):
    launcher = harness.launcher(network="nowhere")
    with pytest.raises(LaunchFailed, match="nowhere"):
        await launcher.launch(assign(ONE))
    assert harness.left() == []


async def test_an_engine_that_does_not_answer_is_unknown_and_not_empty(harness, assign, tmp_path):
    engine = Engine(f"unix://{tmp_path}/nowhere.sock")
    launcher = DockerLauncher(harness.plan(), engine)
    with pytest.raises(Unavailable, match="does not answer"):
        await launcher.list()
    with pytest.raises(Unavailable, match="does not answer"):
        await launcher.launch(assign(ONE))
    await launcher.close()


async def test_an_engine_without_gpus_says_so(harness, assign):
    """This calls the real engine."""
    if any("nvidia" in name for name in api().info().get("Runtimes", {})):
        pytest.skip("this engine has NVIDIA's runtime, so it may have GPUs to list")
    launcher = DockerLauncher(harness.plan(gpu_request="devices"), Engine(harness.url))
    with pytest.raises(Unavailable, match="GPUs cannot be listed"):
        await launcher.launch(assign(ONE, resources={"gpus": 1}))
    assert harness.left() == [], "the probe's container is removed, too"
    await launcher.close()


async def test_a_gpu_belongs_to_who_runs_on_it(harness, assign):
    launcher = harness.launcher(gpus=[BIG, SMALL])
    await launcher.launch(assign(ONE, resources={"gpus": 1}))
    await launcher.launch(assign(TWO, resources={"gpus": 1}))
    assert (await one_of(launcher, ONE)).gpus == ("GPU-small",), "the smallest that fits"
    assert "NVIDIA_VISIBLE_DEVICES=GPU-small" in harness.inspect(ONE)["Config"]["Env"]
    adopted = harness.launcher(gpus=[BIG, SMALL])
    with pytest.raises(LaunchFailed, match=rf"GPU-big has 0 of 80000 MiB free \(used by {TWO}\)"):
        await adopted.launch(assign(THREE, resources={"gpus": 1}))
    harness.until_up(ONE, TWO)
    harness.crash(ONE)
    await gone_of(adopted, ONE)
    await adopted.launch(assign(THREE, resources={"gpus": 1}))
    assert (await one_of(adopted, THREE)).gpus == ("GPU-small",), "the GPU is free once its holder is dead"


async def gone_of(launcher, replica):
    async with asyncio.timeout(PATIENCE_S):
        while (await one_of(launcher, replica)).alive:
            await asyncio.sleep(0.02)


async def test_small_deployments_share_a_gpu_by_declared_memory(harness, assign):
    launcher = harness.launcher(gpus=[BIG, SMALL])
    await launcher.launch(assign("a-v1-0-1", resources={"gpu_memory_mb": 8_000}))
    await launcher.launch(assign("b-v1-0-1", resources={"gpu_memory_mb": 6_000}))
    await launcher.launch(assign("c-v1-0-1", resources={"gpu_memory_mb": 4_000}))
    held = {each.replica: each.gpus for each in await launcher.list()}
    assert held == {"a-v1-0-1": ("GPU-small",), "b-v1-0-1": ("GPU-small",), "c-v1-0-1": ("GPU-big",)}
    with pytest.raises(LaunchFailed, match="needs 1 whole GPU"):
        await launcher.launch(assign("d-v1-0-1", resources={"gpus": 1}))


@pytest.mark.parametrize("attempt", range(3))
async def test_two_autoscalers_that_choose_a_gpu_at_once_do_not_both_get_it(harness, assign, attempt):
    launches = [
        harness.launcher(gpus=[SMALL]).launch(assign(f"digits-v1-{slot}-1", resources={"gpus": 1}))
        for slot in range(4)
    ]
    ends = await asyncio.gather(*launches, return_exceptions=True)
    assert [type(end).__name__ for end in ends].count("NoneType") == 1
    running = await harness.launcher().list()
    assert [each.gpus for each in running] == [("GPU-small",)]


async def test_logs_of_dead_replicas_are_bounded(harness, assign, monkeypatch):
    monkeypatch.setattr("services.autoscaler.domain.log_retention.MOST_EACH", 2)
    launcher = harness.launcher("broken")
    for generation in range(1, 5):
        await launcher.launch(assign(f"digits-v1-0-{generation}"))
        await gone(launcher)
        await launcher.kill(f"digits-v1-0-{generation}")
    assert len(list((harness.state / "log").glob("worker-*.log"))) == 2
