"""Which GPUs a replica gets, from what the machine has and what runs there.

The owner of a GPU is what runs on it: a claim is read from the label of a container, or from the folder of a
process, that exists, and ends with it. A claim counts MiB of a GPU; one on a whole GPU counts all of its
memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from services.autoscaler.domain.plural import counted
from tidegate.kernel.protocol.models import Resources

Shares = Mapping[str, int]
"""MiB by UUID."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU of the machine that replicas run on."""

    uuid: str
    memory_mb: int
    name: str = ""


@dataclass(frozen=True, slots=True)
class GpuClaim:
    """What a replica holds. ``order``: of two claims that cannot both hold, the lesser one does."""

    replica: str
    shares: Shares
    order: tuple[int, str, str] = (0, "", "")


class NoRoom(Exception):
    """The wish cannot be met now; the message says what stands in its way."""


def place(gpus: Sequence[Gpu], claims: Iterable[GpuClaim], wish: Resources) -> dict[str, int]:
    """The GPUs for a wish, as MiB by UUID; empty when it wants none. Raises :class:`NoRoom`.

    A share goes where it leaves the least behind (best fit), so that whole GPUs stay free for those who need
    whole ones; whole ones are taken from the smallest up.
    """
    claims = list(claims)
    free = {gpu.uuid: gpu.memory_mb - _held(gpu.uuid, claims) for gpu in gpus}
    if wish.gpu_memory_mb:
        fitting = [gpu for gpu in gpus if free[gpu.uuid] >= wish.gpu_memory_mb]
        if not fitting:
            raise NoRoom(f"needs {wish.gpu_memory_mb} MiB of a GPU; {_state(gpus, free, claims)}")
        best = min(fitting, key=lambda gpu: (free[gpu.uuid], gpu.uuid))
        return {best.uuid: wish.gpu_memory_mb}
    whole = sorted(
        (gpu for gpu in gpus if free[gpu.uuid] == gpu.memory_mb), key=lambda gpu: (gpu.memory_mb, gpu.uuid)
    )
    if len(whole) < wish.gpus:
        raise NoRoom(f"needs {counted(wish.gpus, 'whole GPU')}; {_state(gpus, free, claims)}")
    return {gpu.uuid: gpu.memory_mb for gpu in whole[: wish.gpus]}


def stands(gpus: Sequence[Gpu], claims: Iterable[GpuClaim], mine: GpuClaim) -> bool:
    """Whether ``mine`` holds beside those that come before it: the fence between two who chose at once.

    Both make their claim first and look then, so at least one sees both, and both judge alike.
    """
    before = [each for each in claims if each.replica != mine.replica and each.order < mine.order]
    memory = {gpu.uuid: gpu.memory_mb for gpu in gpus}
    return all(_held(uuid, before) + mb <= memory.get(uuid, 0) for uuid, mb in mine.shares.items())


def to_label(shares: Shares) -> str:
    """Shares as the value of a label."""
    return ",".join(f"{uuid}={mb}" for uuid, mb in sorted(shares.items()))


def from_label(label: str) -> dict[str, int]:
    """Shares from the value of a label; what is not one is passed over."""
    pairs = (part.partition("=") for part in label.split(","))
    return {uuid: int(mb) for uuid, _, mb in pairs if uuid and mb.isdecimal()}


def read_inventory(listing: str) -> tuple[Gpu, ...]:
    """The GPUs of ``nvidia-smi --query-gpu=uuid,memory.total,name --format=csv,noheader,nounits``."""
    rows = (line.split(",", 2) for line in listing.splitlines() if line.count(",") >= 2)
    fields = ([field.strip() for field in row] for row in rows)
    return tuple(
        Gpu(uuid, int(memory), name)
        for uuid, memory, name in fields
        if uuid.startswith("GPU-") and memory.isdecimal()
    )


def visible(gpus: Sequence[Gpu], setting: str | None) -> tuple[Gpu, ...]:
    """Return the GPUs that ``CUDA_VISIBLE_DEVICES`` leaves, as CUDA reads it; None: it is not set.

    An entry is an index into the listing, or the beginning of a UUID. The first entry that names no GPU ends
    the list.
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
    """What each GPU has left and who holds the rest."""
    if not gpus:
        return "there are no GPUs to lease"
    told = []
    for gpu in gpus:
        holders = [claim.replica for claim in claims if gpu.uuid in claim.shares]
        by = f", held by {', '.join(sorted(holders))}" if holders else ""
        told.append(f"{gpu.uuid} has {free[gpu.uuid]} of {gpu.memory_mb} MiB free{by}")
    return "; ".join(told)
