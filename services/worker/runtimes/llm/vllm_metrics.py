"""Parse the text of vLLM's metrics. Pure."""

from __future__ import annotations

import re
from typing import Any

_NAMES = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:prompt_tokens_total": "prompt_tokens",
    "vllm:generation_tokens_total": "answer_tokens",
    "vllm:prompt_tokens_cached_total": "cached_tokens",
}
_USAGE, _CONFIG = "vllm:kv_cache_usage_perc", "vllm:cache_config_info"
_LINE = re.compile(r"^(vllm:\w+)(?:\{(.*)\})? (\S+)$")


def read_metrics(text: str) -> dict[str, Any]:
    """Return the fields of ``tidegate.kernel.protocol.presence.EngineReport`` from vLLM's metrics.

    One server can have several engines (data parallel). Then the fields are the sums of all engines.
    """
    found: dict[str, Any] = {}
    shares: list[float] = []
    total = 0
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        name, labels, value = match[1], match[2] or "", float(match[3])
        if name in _NAMES:
            found[_NAMES[name]] = found.get(_NAMES[name], 0) + int(value)
        elif name == _USAGE:
            shares.append(value)
        elif name == _CONFIG:
            total += _tokens(labels)
    if total:
        found["kv_total"] = total
    if total and shares:
        found["kv_used"] = round(sum(shares) / len(shares) * total)
    return found


def _tokens(labels: str) -> int:
    """Return how many tokens fit into an engine's KV cache. Return 0 if the labels do not state it."""
    values = dict(re.findall(r'(\w+)="([^"]*)"', labels))
    try:
        return int(
            values.get("kv_cache_size_tokens") or int(values["num_gpu_blocks"]) * int(values["block_size"])
        )
    except (KeyError, ValueError):
        return 0
