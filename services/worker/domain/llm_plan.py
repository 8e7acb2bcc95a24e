"""Decide how a replica runs a language model: engine, packages, context length, KV cache. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from services.worker.domain.devices import GpuNumbers
from tidegate.kernel.errors import ModelFailed
from tidegate.kernel.protocol import gguf
from tidegate.kernel.protocol.gguf import GgufHeader
from tidegate.kernel.protocol.models import DeploymentSpec, Engine, LlmSpec, Version

# The version of llama.cpp that Tidegate is tested with.
LLAMACPP = "xllamacpp==2026.10.11549"

_ARCHIVE = re.compile(r"\.(tar|tar\.gz|tgz|zip)$", re.IGNORECASE)
_GGUF_ARCHIVE = re.compile(r"\.gguf\.(tar|tar\.gz|tgz|zip)$", re.IGNORECASE)


def spec_of(deployment: DeploymentSpec) -> LlmSpec:
    """Return the Deployment's settings for language models, or the defaults if it has none."""
    return deployment.llm or LlmSpec()


def holds_gguf(filename: str) -> bool:
    """Return True if an artifact with this name is a GGUF file or an archive with one.

    All other archives contain a Hugging Face folder. The registry has checked this.
    """
    return _ARCHIVE.search(filename) is None or _GGUF_ARCHIVE.search(filename) is not None


def is_upstream(filename: str) -> bool:
    """Return True if an artifact with this name is a description of an upstream."""
    return filename.lower().endswith(".json")


def engine_of(version: Version, deployment: DeploymentSpec) -> Engine:
    """Return the engine that runs a version. Raise ModelFailed if the engine cannot read the artifact."""
    named = spec_of(deployment).engine
    if is_upstream(version.filename) and named != "openai-url":
        raise ModelFailed(
            f"The version describes an upstream, which the engine {named} cannot run. Deploy it with "
            "--engine openai-url --upstream ADDRESS."
        )
    gguf = holds_gguf(version.filename)
    if named == "auto":
        return "llamacpp" if gguf else "vllm"
    if named == "llamacpp" and not gguf:
        raise ModelFailed(
            f"The engine llamacpp reads GGUF files, but {version.filename} is a Hugging Face folder. Convert "
            "it with llama.cpp's convert_hf_to_gguf.py and deploy the result, or use --engine vllm."
        )
    return named


def requirements(version: Version, deployment: DeploymentSpec) -> list[str]:
    """Return the version's Python requirements.

    If llama.cpp runs the version, the package of llama.cpp is always one of them.
    """
    lines = list(version.requirements)
    if version.format != "llm" or engine_of(version, deployment) != "llamacpp":
        return lines
    return lines if _names_llamacpp(version) else [*lines, LLAMACPP]


def _names_llamacpp(version: Version) -> bool:
    """Return True if the version's requirements name a build of llama.cpp."""
    lines = version.requirements
    return any(re.split(r"[^A-Za-z0-9_.-]", line, maxsplit=1)[0].lower() == "xllamacpp" for line in lines)


def usable_gpus(version: Version, deployment: DeploymentSpec, gpus: GpuNumbers) -> GpuNumbers:
    """Return those of the replica's ``gpus`` that the engine uses.

    The build of llama.cpp that Tidegate installs uses only the CPU. With this build, return no GPUs if the
    Deployment allows the CPU. If the Deployment does not allow the CPU, and the replica has GPUs, raise
    ModelFailed.
    """
    if not gpus or engine_of(version, deployment) != "llamacpp" or _names_llamacpp(version):
        return gpus
    if deployment.resources.allow_cpu:
        return ()
    raise ModelFailed(
        f"This replica has a GPU, but {LLAMACPP} runs on the CPU only. Deploy the model with a requirements "
        "file that names a build of xllamacpp for CUDA (`--requirements FILE`), use vLLM, deploy without "
        "`gpus` and `gpu_memory_mb`, or allow the CPU with `--resource allow_cpu=1`."
    )


def gpu_share(wanted_mb: int, total_mb: int) -> float:
    """Return the share of a GPU's memory that vLLM may use, rounded down to a thousandth."""
    return math.floor(min(wanted_mb / total_mb, 1.0) * 1000) / 1000


def plan(
    version: Version,
    deployment: DeploymentSpec,
    weights: str,
    header: GgufHeader | None,
    gpus: Sequence[int] = (),
) -> dict[str, Any]:
    """Return the plan for the runtime: the fields of :class:`LlmSpec`, and more.

    The plan also has the chosen engine, the model's name, the number of threads and the GPUs. It has the
    context length and the size of the KV cache, both in tokens.

    ``weights``: the path of the weights in the model's folder. ``header``: the header of a GGUF file; None
    for other weights.
    """
    spec = spec_of(deployment)
    context = gguf.context_of(header, spec.context)
    kv_total = spec.kv_tokens or gguf.kv_tokens_of(context, spec.slots, stated=spec.context is not None)
    return {
        **spec.model_dump(mode="json"),
        "engine": engine_of(version, deployment),
        "name": version.model,
        "weights": weights,
        "context": context,
        "kv_total": kv_total,
        "threads": deployment.threads,
        "gpus": list(gpus),
    }


def main_weights(files: Sequence[str]) -> str:
    """Return the GGUF file to load. ``files``: the names at the archive's root.

    If the file is split, return its first part. If the root has no model or several models, raise
    ModelFailed.
    """
    found = sorted(name for name in files if name.lower().endswith(".gguf"))
    parts = [re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", name, re.IGNORECASE) for name in found]
    first = [name for name, part in zip(found, parts, strict=True) if part is None or int(part[2]) == 1]
    if len(first) != 1:
        raise ModelFailed(
            f"The archive has {len(first)} GGUF files at its root, but needs exactly one. Put adapters into "
            "a folder, and deploy again."
        )
    return first[0]
