"""Choose the GPUs of a replica, from the GPUs of the machine and the claims on them.

A claim is a number of MiB of a GPU's memory. A claim on a whole GPU is for all its memory. A claim is stored
with its replica: as a label of the container, or as a file in the folder of the process. So the claim ends
with the replica.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from services.autoscaler.domain.plural import counted
from tidegate.kernel.protocol.models import Resources

# Arguments of `nvidia-smi`. `read_inventory` reads the output.
QUERY = ["--query-gpu=uuid,memory.total,name", "--format=csv,noheader,nounits"]

Shares = Mapping[str, int]
"""MiB by UUID of the GPU."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU of the machine that replicas run on."""

    uuid: str
    memory_mb: int
    name: str = ""


@dataclass(frozen=True, slots=True)
class GpuClaim:
    """The GPU memory that a replica claims.

    ``order`` says which of two claims comes first. If two claims together need more memory than the GPU has,
    only the claim with the smaller ``order`` is valid.
    """

    replica: str
    shares: Shares
    order: tuple[int, str, str] = (0, "", "")


class GpuInventory(Protocol):
    """The interface that lists the GPUs of the machine."""

    async def gpus(self) -> tuple[Gpu, ...]:
        """Return all GPUs. Raise ``Unavailable`` if they cannot be listed."""


class NoRoom(Exception):
    """The error for a replica whose GPUs cannot be provided now.

    The message says why, and which replicas use the GPUs.
    """


def place(gpus: Sequence[Gpu], claims: Iterable[GpuClaim], resources: Resources) -> dict[str, int]:
    """Choose the GPUs for ``resources``. Return the MiB that the replica gets of each, by UUID.

    The result is empty if no GPU is needed. A part of a GPU is taken from the GPU with the least free memory
    (best fit), so that whole GPUs stay free. Of whole GPUs, the smallest are taken first. Raise
    :class:`NoRoom` if the free GPUs are not enough.
    """
    claims = list(claims)
    free = {gpu.uuid: gpu.memory_mb - _held(gpu.uuid, claims) for gpu in gpus}
    if resources.gpu_memory_mb:
        fitting = [gpu for gpu in gpus if free[gpu.uuid] >= resources.gpu_memory_mb]
        if not fitting:
            raise NoRoom(
                f"a replica needs {resources.gpu_memory_mb} MiB of a GPU; {_state(gpus, free, claims)}"
            )
        best = min(fitting, key=lambda gpu: (free[gpu.uuid], gpu.uuid))
        return {best.uuid: resources.gpu_memory_mb}
    whole = sorted(
        (gpu for gpu in gpus if free[gpu.uuid] == gpu.memory_mb), key=lambda gpu: (gpu.memory_mb, gpu.uuid)
    )
    if len(whole) < resources.gpus:
        raise NoRoom(f"a replica needs {counted(resources.gpus, 'whole GPU')}; {_state(gpus, free, claims)}")
    return {gpu.uuid: gpu.memory_mb for gpu in whole[: resources.gpus]}


def stands(gpus: Sequence[Gpu], claims: Iterable[GpuClaim], mine: GpuClaim) -> bool:
    """Return True if ``mine`` fits beside the claims with a smaller ``order``.

    Each launch first writes its claim and then checks it. If two launches write claims at the same time, at
    least one of them sees both claims. All launches compare ``order``, so they agree which claim is valid.
    """
    before = [each for each in claims if each.replica != mine.replica and each.order < mine.order]
    memory = {gpu.uuid: gpu.memory_mb for gpu in gpus}
    return all(_held(uuid, before) + mb <= memory.get(uuid, 0) for uuid, mb in mine.shares.items())


def to_label(shares: Shares) -> str:
    """Return a replica's shares of GPU memory as the value of a container's label."""
    return ",".join(f"{uuid}={mb}" for uuid, mb in sorted(shares.items()))


def from_label(label: str) -> dict[str, int]:
    """Return the shares in the value of a label. Skip invalid parts."""
    pairs = (part.partition("=") for part in label.split(","))
    return {uuid: int(mb) for uuid, _, mb in pairs if uuid and mb.isdecimal()}


def read_inventory(listing: str) -> tuple[Gpu, ...]:
    """Return the GPUs in the output of ``nvidia-smi`` with :data:`QUERY`."""
    rows = (line.split(",", 2) for line in listing.splitlines() if line.count(",") >= 2)
    fields = ([field.strip() for field in row] for row in rows)
    return tuple(
        Gpu(uuid, int(memory), name)
        for uuid, memory, name in fields
        if uuid.startswith("GPU-") and memory.isdecimal()
    )


def visible(gpus: Sequence[Gpu], setting: str | None) -> tuple[Gpu, ...]:
    """Return the GPUs that ``setting``, the value of ``CUDA_VISIBLE_DEVICES``, allows.

    If ``setting`` is None, the variable is not set and all GPUs are allowed. Each entry is an index into
    ``gpus``, or the beginning of a UUID. An entry is invalid if it does not match exactly one GPU, or if an
    earlier entry named the same GPU. The first invalid entry and all entries after it are ignored.
    """
    if setting is None:
        return tuple(gpus)
    found: list[Gpu] = []
    for entry in (part.strip() for part in setting.split(",")):
        if entry.isdecimal():
            named = gpus[int(entry) : int(entry) + 1]
        else:
            named = [gpu for gpu in gpus if entry.startswith("GPU-") and gpu.uuid.startswith(entry)]
        if len(named) != 1 or named[0] in found:
            break
        found += named
    return tuple(found)


def _held(uuid: str, claims: Iterable[GpuClaim]) -> int:
    return sum(claim.shares.get(uuid, 0) for claim in claims)


def _state(gpus: Sequence[Gpu], free: Shares, claims: Sequence[GpuClaim]) -> str:
    """Describe how much of each GPU is free, and which replicas use the rest."""
    if not gpus:
        return "this host has no GPU"
    parts = []
    for gpu in gpus:
        holders = [claim.replica for claim in claims if gpu.uuid in claim.shares]
        by = f" (used by {', '.join(sorted(holders))})" if holders else ""
        parts.append(f"{gpu.uuid} has {free[gpu.uuid]} of {gpu.memory_mb} MiB free{by}")
    return "; ".join(parts)
