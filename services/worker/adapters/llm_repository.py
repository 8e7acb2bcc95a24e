"""Write the Triton model of a language model: the weights, the runtime and the plan."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from services.worker.adapters.archives import unpack
from services.worker.domain import llm_plan, model_config
from services.worker.domain.devices import GpuNumbers, gpu_names
from tidegate.kernel.archives import is_archive
from tidegate.kernel.errors import ModelFailed
from tidegate.kernel.protocol import gguf
from tidegate.kernel.protocol.gguf import GgufHeader
from tidegate.kernel.protocol.models import DeploymentSpec, Version

RUNTIME = Path(__file__).parents[1] / "runtimes" / "llm"
MEMORY_QUERY = ("nvidia-smi", "--query-gpu=uuid,memory.total", "--format=csv,noheader,nounits")
MEMORY_TIMEOUT_S = 10.0
PLAN, WEIGHTS = "tidegate_llm.json", "weights"


def prepare(
    version: Version,
    deployment: DeploymentSpec,
    artifact: Path,
    folder: Path,
    gpus: GpuNumbers,
    place: Callable[[Path, Path], None],
    engine_python: Path | None = None,
) -> str:
    """Write a model's version folder, ``folder/1``. Return the text of the model's configuration.

    This function blocks. ``place``: a function that links or copies a cached file to another path.
    ``engine_python``: the Python of the engine's own environment; None if the engine has none. Raises
    ModelFailed if the weights cannot be used.
    """
    inner = folder / "1"
    inner.mkdir(parents=True)
    upstream = llm_plan.is_upstream(version.filename)
    weights = "" if upstream else _put_weights(artifact, inner, place)
    header = _header(inner / weights) if weights.lower().endswith(".gguf") else None
    gpus = llm_plan.usable_gpus(version, deployment, gpus)
    plan = llm_plan.plan(version, deployment, weights, header, gpus)
    plan["engine_python"] = str(engine_python or "")
    if gpus and plan["engine"] == "vllm" and (wanted_mb := deployment.resources.gpu_memory_mb):
        plan["gpu_share"] = llm_plan.gpu_share(wanted_mb, _memory_mb(gpus[0]))
    (inner / PLAN).write_text(json.dumps(plan))
    for source in RUNTIME.glob("*.py"):
        shutil.copyfile(source, inner / source.name)
    # One Triton instance serves all engine slots. A second instance would load the weights again.
    single = deployment.model_copy(update={"instances": 1})
    # Triton creates one instance for each GPU in the configuration. This instance uses all GPUs of the
    # replica, so the configuration names only the first GPU.
    return model_config.build(version, single, model=version.model, backend="python", gpus=gpus[:1])


def _put_weights(artifact: Path, inner: Path, place: Callable[[Path, Path], None]) -> str:
    """Put the weights into ``inner``. Return the path below ``inner`` that the engine must load."""
    if is_archive(artifact):
        unpack(artifact, inner / WEIGHTS)
        files = [path.name for path in (inner / WEIGHTS).iterdir() if path.is_file()]
        return WEIGHTS if "config.json" in files else f"{WEIGHTS}/{llm_plan.main_weights(files)}"
    place(artifact, inner / "model.gguf")
    return "model.gguf"


def _memory_mb(gpu: int) -> int:
    """Return a GPU's total memory in MiB. Raise ModelFailed if it is unknown.

    ``gpu``: the GPU's number inside this process. ``CUDA_VISIBLE_DEVICES`` decides which GPU has this number.
    """
    try:
        listing = subprocess.run(
            MEMORY_QUERY, capture_output=True, text=True, timeout=MEMORY_TIMEOUT_S, check=True
        )
        return int(gpu_names(listing.stdout, os.environ.get("CUDA_VISIBLE_DEVICES"))[gpu])
    except (OSError, subprocess.SubprocessError, KeyError, ValueError) as problem:
        raise ModelFailed(
            f"The GPU's memory is unknown ({problem!r}), so vLLM cannot be limited to `gpu_memory_mb`. Check "
            "`nvidia-smi` on this host, or deploy with `--resource gpus=1`."
        ) from None


def _header(path: Path) -> GgufHeader:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        view = memoryview(data)
        try:
            return gguf.read(view)
        except gguf.NotGguf as problem:
            raise ModelFailed(f"{path.name} is not a usable GGUF file: {problem}.") from None
        finally:
            view.release()
