"""The command line and the environment of a vLLM server. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# vLLM's options that a Deployment's arguments may not contain, each with what sets it.
_OURS = {
    "model": "the artifact", "tokenizer": "the artifact", "served-model-name": "the runtime",
    "uds": "the runtime",
    "host": "the runtime", "port": "the runtime", "api-key": "the runtime", "max-num-seqs": "--slots",
    "max-model-len": "--context", "enable-lora": "--adapter", "lora-modules": "--adapter",
    "ssl-keyfile": "the runtime", "ssl-certfile": "the runtime", "root-path": "the runtime",
}  # fmt: skip
_PARALLEL = ("tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size")
# Variables that vLLM must not inherit. Those of Triton and its Python would break vLLM's Python, and the
# credential is not for vLLM.
_MISLEADING = ("PYTHONHOME", "PYTHONPATH", "PYTHONSTARTUP", "LD_PRELOAD", "TIDEGATE_UPSTREAM_CREDENTIAL")
_BYTES = 4  # bytes of a float32, the type of the KV cache on CPUs


def command(
    plan: Mapping[str, Any], config: Mapping[str, Any], folder: Path, socket: str, *, bf16: bool
) -> list[str]:
    """Return the command line of the server. ``config``: the model's configuration.

    ``bf16``: True if the CPU can compute in bfloat16. Raise ValueError for an argument that the Deployment or
    the runtime sets.
    """
    own = {name.lstrip("-").replace("_", "-"): value for name, value in plan["arguments"].items()}
    for name in own:
        if name in _OURS:
            raise ValueError(f"{name!r} is set by {_OURS[name]}: remove it from the engine arguments")
    found: dict[str, Any] = {
        "max-num-seqs": plan["slots"],
        "max-model-len": min(plan["context"], config.get("max_position_embeddings") or plan["context"]),
        "enable-prompt-tokens-details": True,
        "disable-uvicorn-access-log": True,
    }
    gpus = len(plan["gpus"])
    if not gpus:
        # The prefix cache stores only whole blocks of tokens. With the default block of 128 tokens, it would
        # never find short prompts.
        found |= {"enforce-eager": True, "block-size": 32} | ({} if bf16 else {"dtype": "float32"})
    elif gpus > 1 and not own.keys() & set(_PARALLEL):
        found["tensor-parallel-size"] = gpus
    if (share := plan.get("gpu_share")) is not None:
        # By default, vLLM takes nine tenths of the GPU's memory, also if other replicas share the GPU.
        found["gpu-memory-utilization"] = share
    start = [
        plan["engine_python"], "-m", "vllm.entrypoints.openai.api_server", "--uds", socket,
        "--model", str(folder / plan["weights"]), "--served-model-name", plan["name"],
    ]  # fmt: skip
    adapters = [f"{name}={folder / 'weights' / path}" for name, path in plan["adapters"].items()]
    lora = ["--enable-lora", "--lora-modules", *adapters] if adapters else []
    return [*start, *(word for name, value in (found | own).items() for word in _words(name, value)), *lora]


def _words(name: str, value: str | float | bool) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", str(value)]


def environment(
    plan: Mapping[str, Any],
    config: Mapping[str, Any],
    inherited: Mapping[str, str],
    libraries: Path,
    place: str,
) -> dict[str, str]:
    """Return the environment of the server.

    ``libraries``: the folder of libraries of vLLM's own environment. ``place``: a folder for temporary files,
    which only the server's user can open.
    """
    found = {key: value for key, value in inherited.items() if key not in _MISLEADING}
    # By default, PyTorch caches compiled code in a temporary folder that has the user's name. Models run with
    # different uids, but with the same user name. So a model would load the code of another model, or fail if
    # it may not read that code.
    found["TMPDIR"] = place
    if "HOME" in found:
        found.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{found['HOME']}/.cache/torchinductor")
    found["LD_LIBRARY_PATH"] = ":".join([str(libraries), *filter(None, [found.get("LD_LIBRARY_PATH")])])
    # The model is on this host. vLLM must not look for it elsewhere, and must not report usage.
    found |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1"}
    found.setdefault("VLLM_LOG_STATS_INTERVAL", "60")
    found.setdefault("LC_ALL", "C.UTF-8")
    if plan["gpus"]:
        return found
    found |= {"VLLM_TARGET_DEVICE": "cpu", "KMP_BLOCKTIME": "0", "OMP_NUM_THREADS": str(plan["threads"])}
    # Without this setting, the first request of each kind waits half a minute, while a C++ compiler builds
    # parts of vLLM's sampler.
    found.setdefault("TORCH_COMPILE_DISABLE", "1")
    openmp = libraries / "libiomp5.so"
    if openmp.exists():
        found["LD_PRELOAD"] = str(openmp)
    found.setdefault("VLLM_CPU_KVCACHE_SPACE", str(kv_gib(plan, config)))
    if _parallel(plan) == 1:
        # Replicas share the cores. By default, vLLM would bind all replicas to the same cores.
        found.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    return found


def kv_gib(plan: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    """Return the size of the KV cache on a CPU, in GiB, for the plan's number of tokens."""
    heads = config.get("num_attention_heads") or 1
    width = config.get("head_dim") or (config.get("hidden_size") or 1) // heads
    per_token = 2 * _BYTES * width * (config.get("num_key_value_heads") or heads)
    return max(math.ceil(plan["kv_total"] * per_token * (config.get("num_hidden_layers") or 1) / 2**30), 1)


def _parallel(plan: Mapping[str, Any]) -> int:
    own = {name.lstrip("-").replace("_", "-"): value for name, value in plan["arguments"].items()}
    return math.prod(int(own.get(name, 1)) for name in _PARALLEL)
