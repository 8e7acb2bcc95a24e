"""Decide on which GPUs a model may run, and describe where it runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from services.worker.domain.pbtxt import messages
from tidegate.kernel.errors import ModelFailed
from tidegate.kernel.protocol.models import Format, Resources

CPU = "cpu"
# GPU numbers inside a process. In each process, CUDA numbers the visible GPUs from 0. So these numbers can
# differ from the machine's numbers.
GpuNumbers = tuple[int, ...]
Kind = Literal["auto", "cpu", "gpu", "model"]
_KINDS: dict[str, Kind] = {
    "KIND_AUTO": "auto", "KIND_GPU": "gpu", "KIND_CPU": "cpu", "KIND_MODEL": "model",
    "0": "auto", "1": "gpu", "2": "cpu", "3": "model",
}  # fmt: skip


# The formats whose library can use only the CPU in Tidegate. Each format has the name of its library.
_CPU_ONLY: dict[Format, str] = {
    "sklearn": "scikit-learn", "xgboost": "XGBoost", "lightgbm": "LightGBM", "catboost": "CatBoost",
    "tflite": "TensorFlow Lite", "tensorflow": "TensorFlow",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class InstanceGroup:
    """An instance group of a model: its kind and its GPUs."""

    kind: Kind
    gpus: GpuNumbers = ()


def replica_gpus(resources: Resources) -> GpuNumbers:
    """Return the GPU numbers inside a replica that has these resources."""
    return tuple(range(resources.gpus or (1 if resources.gpu_memory_mb else 0)))


def usable_gpus(artifact_format: Format, devices: GpuNumbers, *, allow_cpu: bool) -> GpuNumbers:
    """Return the GPUs that a single-file artifact uses.

    Artifacts of some formats can run only on the CPU. If the replica has GPUs and the artifact has such a
    format, the result depends on ``allow_cpu``. If ``allow_cpu`` is True, return no GPUs. If it is False,
    raise ModelFailed.
    """
    if artifact_format not in _CPU_ONLY or not devices:
        return devices
    if allow_cpu:
        return ()
    raise ModelFailed(
        f"This replica has a GPU, but {_CPU_ONLY[artifact_format]} runs on the CPU only. Deploy the "
        "model without `gpus` and `gpu_memory_mb`, export it to ONNX, or allow the CPU with "
        "`--resource allow_cpu=1`."
    )


def instance_groups(text: str) -> list[InstanceGroup]:
    """Return the instance groups of a user's ``config.pbtxt``. Unreadable GPU numbers are ignored."""
    found = []
    for group in messages(text, "instance_group"):
        kind = _KINDS.get(group.get("kind", ["KIND_AUTO"])[-1], "auto")
        found.append(InstanceGroup(kind, tuple(int(gpu) for gpu in group.get("gpus", ()) if gpu.isdecimal())))
    return found


def check_instance_groups(model: str, groups: Iterable[InstanceGroup], devices: GpuNumbers) -> None:
    """Raise ModelFailed, with the remedy, if an instance group needs a GPU that the replica does not have."""
    for group in groups:
        if group.kind in ("cpu", "model"):
            continue
        if group.kind == "gpu" and not devices:
            raise ModelFailed(
                f"The config.pbtxt of {model!r} requests a GPU (instance_group with KIND_GPU), but this "
                "replica has none. Deploy with `--resource gpus=1`, or write KIND_CPU."
            )
        missing = sorted(set(group.gpus) - set(devices))
        if missing:
            numbers = ", ".join(map(str, missing))
            named = f"0 to {devices[-1]}" if len(devices) > 1 else "0" if devices else "none"
            raise ModelFailed(
                f"The config.pbtxt of {model!r} requests GPU {numbers}, but this replica has {len(devices)} "
                f"GPU(s) (numbers inside the replica: {named}). Change `gpus` in the instance_group, or "
                f"deploy with `--resource gpus={max(missing) + 1}`."
            )


def describe(groups: Iterable[InstanceGroup], names: Mapping[int, str]) -> str:
    """Return a comma-separated list of the devices on which a model runs.

    A device is ``cpu`` or, for example, ``cuda:0 (NVIDIA H100 80GB HBM3)``. ``groups``: the instance groups
    as Triton resolved them. A group without GPUs runs on the CPU.
    """
    found: list[str] = []
    for group in groups:
        found += [_named(gpu, names) for gpu in group.gpus] if group.gpus else [CPU]
    return ", ".join(dict.fromkeys(found))


def _named(gpu: int, names: Mapping[int, str]) -> str:
    return f"cuda:{gpu} ({names[gpu]})" if names.get(gpu) else f"cuda:{gpu}"


def gpu_names(listing: str, setting: str | None) -> dict[int, str]:
    """Return a dict from a GPU's number inside a process to the GPU's name.

    ``listing`` is the output of ``nvidia-smi --query-gpu=uuid,name --format=csv,noheader``. ``setting`` is
    the process's ``CUDA_VISIBLE_DEVICES``; None if it is not set.
    """
    rows = [line.partition(",") for line in listing.splitlines() if line.startswith("GPU-")]
    gpus = [(uuid.strip(), name.strip()) for uuid, _, name in rows]
    if setting is None:
        return {number: name for number, (_, name) in enumerate(gpus)}
    entries = [entry.strip() for entry in setting.split(",")]
    return {number: name for number, entry in enumerate(entries) if (name := _name(entry, gpus))}


def _name(entry: str, gpus: Sequence[tuple[str, str]]) -> str:
    if entry.isdecimal():
        return gpus[int(entry)][1] if int(entry) < len(gpus) else ""
    return next((name for uuid, name in gpus if entry and uuid.startswith(entry)), "")
