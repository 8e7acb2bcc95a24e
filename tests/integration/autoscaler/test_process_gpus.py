"""Test the GPUs of the process launcher with real processes and a fake `nvidia-smi`."""

from __future__ import annotations

import asyncio

import pytest

from services.autoscaler.adapters.process.gpu_inventory import RETRY_AFTER_S, MachineGpus
from services.autoscaler.adapters.process.launcher import ProcessLauncher, ProcessPlan
from services.autoscaler.domain.launcher import LaunchFailed
from tests.integration.autoscaler.test_launcher_docker import one_of

ONE, TWO, THREE = "digits-v1-0-1", "digits-v1-1-1", "digits-v1-2-1"
BIG, SMALL = "GPU-big, 80000, NVIDIA H100 80GB HBM3", "GPU-small, 16000, Tesla T4"


@pytest.fixture
def harness(processes, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    processes.has_gpus(BIG, SMALL)
    return processes


async def test_whole_gpus_are_exclusive_also_for_an_autoscaler_that_adopts(harness, assign):
    launcher = harness.launcher()
    await launcher.launch(assign(ONE, resources={"gpus": 1}))
    await launcher.launch(assign(TWO, resources={"gpus": 1}))
    harness.until_up(ONE, TWO)
    assert (await one_of(launcher, ONE)).gpus == ("GPU-small",), "the smallest that fits"
    assert harness.environment(ONE)["CUDA_VISIBLE_DEVICES"] == "GPU-small"
    assert harness.environment(TWO)["CUDA_VISIBLE_DEVICES"] == "GPU-big"
    adopted = harness.launcher()
    assert (await one_of(adopted, TWO)).gpus == ("GPU-big",)
    with pytest.raises(LaunchFailed, match=rf"GPU-big has 0 of 80000 MiB free \(used by {TWO}\)"):
        await adopted.launch(assign(THREE, resources={"gpus": 1}))
    assert [each.replica for each in await adopted.list()] == [ONE, TWO], "the name is free again"
    await adopted.kill(ONE)
    await adopted.launch(assign(THREE, resources={"gpus": 1}))
    assert (await one_of(adopted, THREE)).gpus == ("GPU-small",)


async def test_both_gpus_for_one_replica_are_numbered_from_zero_inside(harness, assign):
    launcher = harness.launcher()
    await launcher.launch(assign(ONE, resources={"gpus": 2}))
    harness.until_up(ONE)
    seen = harness.environment(ONE)
    # CUDA numbers the devices of a process by their place in this list.
    assert seen["CUDA_VISIBLE_DEVICES"] == "GPU-big,GPU-small"
    assert seen["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


async def test_what_a_dead_worker_left_running_holds_its_gpu(harness, assign):
    """Its Triton may still use memory of the GPU."""
    harness.has_gpus(SMALL)
    launcher = harness.launcher()
    await launcher.launch(assign(ONE, resources={"gpus": 1}))
    harness.until_up(ONE)
    harness.crash(ONE)
    assert not (await one_of(launcher, ONE)).alive
    with pytest.raises(LaunchFailed, match=f"used by {ONE}"):
        await launcher.launch(assign(TWO, resources={"gpus": 1}))
    await launcher.kill(ONE)
    await launcher.launch(assign(TWO, resources={"gpus": 1}))


async def test_a_replica_without_gpus_sees_none_and_needs_no_listing(harness, assign):
    """Otherwise it could use a GPU that another replica holds alone."""
    harness.nvidia_smi.unlink()
    await harness.launcher().launch(assign(ONE))
    harness.until_up(ONE)
    assert harness.environment(ONE)["CUDA_VISIBLE_DEVICES"] == ""


async def test_shares_of_a_gpu_are_placed_by_declared_memory(harness, assign):
    launcher = harness.launcher()
    for replica, memory_mb in ((ONE, 10_000), (TWO, 6_000), (THREE, 6_001)):
        await launcher.launch(assign(replica, resources={"gpu_memory_mb": memory_mb}))
    held = {each.replica: each.gpus for each in await launcher.list()}
    assert held == {ONE: ("GPU-small",), TWO: ("GPU-small",), THREE: ("GPU-big",)}
    with pytest.raises(LaunchFailed, match="needs 1 whole GPU"):
        await launcher.launch(assign("digits-v1-3-1", resources={"gpus": 1}))


async def test_launches_at_once_of_two_autoscalers_never_share_a_whole_gpu(harness, assign):
    launches = (
        launcher.launch(assign(f"digits-v1-{slot}-1", resources={"gpus": 1}))
        for slot, launcher in enumerate([harness.launcher(), harness.launcher()] * 3)
    )
    ends = await asyncio.gather(*launches, return_exceptions=True)
    assert sorted(type(end).__name__ for end in ends) == ["NoFreeGpu"] * 4 + ["NoneType"] * 2
    held = [each.gpus for each in await harness.launcher().list()]
    assert sorted(held) == [("GPU-big",), ("GPU-small",)]


async def test_the_stack_gives_only_what_its_own_cuda_visible_devices_leaves(harness, assign, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-small")
    launcher = harness.launcher()
    await launcher.launch(assign(ONE, resources={"gpus": 1}))
    with pytest.raises(LaunchFailed, match="needs 1 whole GPU; GPU-small has 0 of 16000 MiB free"):
        await launcher.launch(assign(TWO, resources={"gpus": 1}))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    with pytest.raises(LaunchFailed, match=r"CUDA_VISIBLE_DEVICES='-1' .* excludes all GPUs"):
        await harness.launcher().launch(assign(TWO, resources={"gpus": 1}))


async def test_a_host_without_gpus_says_so(harness, assign):
    harness.nvidia_smi.unlink()
    with pytest.raises(LaunchFailed, match=r"has no GPU: .*nvidia-smi cannot be run \(No such file"):
        await harness.launcher().launch(assign(ONE, resources={"gpus": 1}))
    harness.has_gpus("NVIDIA-SMI has failed because it could not communicate with the driver", code=9)
    with pytest.raises(LaunchFailed, match="exited with code 9: NVIDIA-SMI has failed"):
        await harness.launcher().launch(assign(ONE, resources={"gpus": 1}))
    harness.has_gpus()
    with pytest.raises(LaunchFailed, match="nvidia-smi lists none"):
        await harness.launcher().launch(assign(ONE, resources={"gpus": 1}))
    assert await harness.launcher().list() == []


async def test_a_driver_that_comes_later_is_found(harness, assign):
    now = [0.0]
    harness.has_gpus(code=9)
    inventory = MachineGpus(str(harness.nvidia_smi), lambda: now[0])
    launcher = ProcessLauncher(ProcessPlan(["/bin/true"], harness.state), inventory)
    for _ in range(2):
        with pytest.raises(LaunchFailed, match="has no GPU"):
            await launcher.launch(assign(ONE, resources={"gpus": 1}))
        harness.has_gpus(SMALL)
    now[0] += RETRY_AFTER_S
    await launcher.launch(assign(ONE, resources={"gpus": 1}))
