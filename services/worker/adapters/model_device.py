"""Find out from Triton on which devices a model runs. The GPUs' names come from `nvidia-smi`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence

from services.worker.adapters.triton_client import TritonClient
from services.worker.domain.devices import InstanceGroup, Kind, describe, gpu_names

QUERY = ("nvidia-smi", "--query-gpu=uuid,name", "--format=csv,noheader")
TIMEOUT_S = 10.0
_KINDS: dict[int, Kind] = {0: "auto", 1: "gpu", 2: "cpu", 3: "model"}


async def read_device(client: TritonClient, models: Sequence[str]) -> str:
    """Return a text about the devices on which these models run.

    An ensemble is left out, because only its steps run on devices.
    """
    configs = [await client.config(model) for model in models]
    groups = [
        InstanceGroup(_KINDS.get(int(group.kind), "auto"), tuple(group.gpus))
        for config in configs
        for group in config.instance_group
        if not config.ensemble_scheduling.step
    ]
    names = await _names() if any(group.gpus for group in groups) else {}
    return describe(groups, names)


async def _names() -> dict[int, str]:
    """Return the names of the GPUs by their numbers in this process; empty if `nvidia-smi` fails."""
    try:
        process = await asyncio.create_subprocess_exec(
            *QUERY,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except OSError:
        return {}
    try:
        async with asyncio.timeout(TIMEOUT_S):
            listing, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        return {}
    return gpu_names(listing.decode(errors="replace"), os.environ.get("CUDA_VISIBLE_DEVICES"))
