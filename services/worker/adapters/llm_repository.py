"""Write the Triton model of a language model: the weights, the runtime and the plan."""

from __future__ import annotations

import json
import mmap
import shutil
from collections.abc import Callable
from pathlib import Path

from services.worker.adapters.archives import unpack
from services.worker.domain import llm_plan, model_config
from services.worker.domain.devices import GpuNumbers
from tidegate.kernel.archives import is_archive
from tidegate.kernel.errors import ModelFailed
from tidegate.kernel.protocol import gguf
from tidegate.kernel.protocol.gguf import GgufHeader
from tidegate.kernel.protocol.models import DeploymentSpec, Version

RUNTIME = Path(__file__).parents[1] / "runtimes" / "llm"
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
    plan = llm_plan.plan(version, deployment, weights, header, gpus)
    plan["engine_python"] = str(engine_python or "")
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


def _header(path: Path) -> GgufHeader:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        view = memoryview(data)
        try:
            return gguf.read(view)
        except gguf.NotGguf as problem:
            raise ModelFailed(f"{path.name} is not a usable GGUF file: {problem}.") from None
        finally:
            view.release()
