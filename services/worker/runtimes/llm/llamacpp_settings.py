"""Turn a plan into llama.cpp's parameters, and refuse arguments that llama.cpp does not have."""

from __future__ import annotations

import difflib
import enum
import secrets
from pathlib import Path
from typing import Any

PATHS = (
    "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/rerank", "/rerank",
    "/tokenize", "/detokenize", "/apply-template", "/infill", "/v1/messages",
    "/v1/chat/completions/input_tokens", "/v1/responses/input_tokens", "/v1/messages/count_tokens",
)  # fmt: skip
# Parameters that the Deployment or this runtime sets.
_OURS = {
    "model": "the artifact", "n_parallel": "--slots", "n_ctx": "--context", "lora_adapters": "--adapter",
    "hostnames": "the runtime", "port": "the runtime", "api_keys": "the runtime", "api_prefix": "the runtime",
    "model_alias": "the runtime", "n_threads_http": "the runtime",
}  # fmt: skip
# The size of the engine's cache of prompts in main memory. Its default of 8 GiB is more than operators
# expect.
PROMPT_CACHE_MB = 256
# The most tokens of a prompt that a CPU reads in one batch. A request can be cancelled only between two
# batches, and other streams get their next token only then. For a prompt of 610 tokens, batches of 64 took
# 3.1 s of CPU time, and batches of 512 (the default) took 3.0 s.
CPU_BATCH = 64
# Log only warnings and errors. At level 3, llama.cpp prints seven lines for each request.
VERBOSITY = 2


def settings(xllamacpp: Any, plan: dict[str, Any], folder: Path) -> tuple[Any, str]:
    """Return the ``CommonParams`` of a plan, and the key of the engine's own HTTP server.

    Raise ValueError for an argument that llama.cpp does not have or does not accept.
    """
    params, key = xllamacpp.CommonParams(), secrets.token_hex(16)
    params.model.path = str(folder / plan["weights"])
    params.model_alias = {plan["name"]}
    params.n_parallel = plan["slots"]
    params.n_ctx = plan["kv_total"]
    params.kv_unified = plan["kv_total"] < plan["slots"] * plan["context"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = plan["threads"]
    params.n_threads_http = plan["slots"] + 4
    params.hostnames, params.port, params.api_keys = ["127.0.0.1"], 0, [key]
    params.cache_ram_mib = PROMPT_CACHE_MB
    params.ui, params.verbosity = False, VERBOSITY
    # For embeddings, the whole prompt must be in one batch, so the batch keeps its default size.
    if not plan["gpus"] and not plan["arguments"].get("embedding"):
        params.n_batch = params.n_ubatch = max(CPU_BATCH, plan["slots"])
    if plan["adapters"]:
        params.cache_ram_mib = 0
    params.lora_adapters = adapters(xllamacpp, plan, folder)
    for name, value in plan["arguments"].items():
        assign(params, name, value)
    return params, key


def adapters(xllamacpp: Any, plan: dict[str, Any], folder: Path) -> list[Any]:
    """Return the LoRA adapters to load. They are used only for requests that name them.

    Raise ValueError if the artifact lacks the file of an adapter.
    """
    found = []
    for name, path in plan["adapters"].items():
        file = folder / "weights" / path
        if not file.is_file():
            raise ValueError(
                f"the artifact has no file {path} for the adapter {name!r}: deploy the model again with "
                f"--adapter {name}=FILE.gguf"
            )
        found.append(xllamacpp.CommonAdapterLoraInfo(str(file), 0.0))
    return found


def assign(params: Any, name: str, value: str | float | bool) -> None:
    """Set one parameter of llama.cpp. The name ``sampling.temp`` means ``temp`` in the group ``sampling``.

    Raise ValueError for an unknown name or a bad value.
    """
    if name in _OURS:
        raise ValueError(f"{name!r} is set by {_OURS[name]}: remove it from the engine arguments")
    *groups, last = name.split(".")
    target = params
    for group in groups:
        target = getattr(target, group, None)
    if target is None or not last or last.startswith("_") or not hasattr(target, last):
        raise ValueError(f"llama.cpp has no argument {name!r}.{_near(params, name)}")
    current = getattr(target, last)
    try:
        setattr(target, last, _converted(current, value))
    except (TypeError, ValueError, OverflowError) as problem:
        kind = type(current).__name__
        raise ValueError(
            f"the engine argument {name}={value!r} does not fit its type {kind}: {problem}"
        ) from None


def _converted(current: Any, value: Any) -> Any:
    """Convert ``value`` to the type of the parameter's current value."""
    if isinstance(current, enum.Enum):
        return _member(type(current), value)
    if isinstance(current, bool):
        if isinstance(value, bool | int) and value in (0, 1):
            return bool(value)
        raise ValueError("expected true or false")
    if isinstance(current, float):
        return float(value)
    if isinstance(current, list | set) and isinstance(value, str):
        return type(current)(part for part in value.split(",") if part)
    return str(value) if isinstance(current, str) else value


def _member(kind: type[enum.Enum], value: Any) -> Any:
    """Return the enumeration's member whose number is ``value``, or whose name ends with ``value``."""
    if isinstance(value, str):
        wanted = value.upper()
        for member in kind:
            if member.name == wanted or member.name.endswith(f"_{wanted}"):
                return member
        raise ValueError(f"expected one of {', '.join(member.name for member in kind)}")
    return kind(value)


def _near(params: Any, name: str) -> str:
    names = [each for each in dir(params) if not each.startswith("_")]
    names += [f"sampling.{each}" for each in dir(params.sampling) if not each.startswith("_")]
    found = difflib.get_close_matches(name, names, n=5, cutoff=0.5)
    found += [each for each in names if name in each and each not in found][:5]
    return f" Did you mean {', '.join(found)}?" if found else ""
