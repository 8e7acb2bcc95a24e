"""Describe endpoints as Ollama describes its models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from services.gateway.domain.llm.ollama_requests import LATEST

# The version of Ollama's API that these answers follow. Some clients require a minimum version.
API_VERSION = "0.13.0"

# Ollama's operations that manage models. The gateway does not support them. The error for each operation says
# what to do instead.
INSTEAD = {
    "pull": "deploy a model with `tidegate deploy MODEL.gguf --name NAME`",
    "push": "deploy a model with `tidegate deploy MODEL.gguf --name NAME`",
    "create": "deploy a model with `tidegate deploy MODEL.gguf --name NAME`",
    "copy": "deploy the model under another name with `tidegate deploy MODEL.gguf --name NAME`",
    "delete": "remove the model with `tidegate delete NAME`",
    "blobs": "deploy a model with `tidegate deploy MODEL.gguf --name NAME`",
}

# These members stay empty: the registry has their values only for some formats, and clients only display
# them.
_DETAILS = {
    "parent_model": "",
    "format": "",
    "family": "",
    "families": [],
    "parameter_size": "",
    "quantization_level": "",
}


@dataclass(frozen=True, slots=True)
class LlmModel:
    """An endpoint with a language model. ``ready``: True if a replica can answer now.

    ``changed``: the time of the Deployment's last change, if known. ``context``: the context length in
    tokens, or None.
    """

    name: str
    context: int | None = None
    ready: bool = False
    changed: str = "1970-01-01T00:00:00Z"


def tags(models: Sequence[LlmModel]) -> dict[str, Any]:
    """Return the answer of ``/api/tags``."""
    return {"models": [_entry(model) | {"modified_at": model.changed} for model in models]}


def running(models: Sequence[LlmModel]) -> dict[str, Any]:
    """Return the answer of ``/api/ps``: the models with a replica that is ready.

    Ollama reports when each model expires. Replicas do not expire, so report the latest possible time.
    """
    shown = {"expires_at": "9999-12-31T23:59:59Z", "size_vram": 0}
    return {
        "models": [
            _entry(model) | shown | {"context_length": model.context or 0} for model in models if model.ready
        ]
    }


def show(model: LlmModel) -> dict[str, Any]:
    """Return the answer of ``/api/show``."""
    info: dict[str, Any] = {"general.architecture": "unknown", "general.basename": model.name}
    if model.context is not None:
        info |= {"unknown.context_length": model.context}
    return {
        "license": "",
        "modelfile": f"# `tidegate status {model.name}` shows the Deployment.\nFROM {model.name}\n",
        "parameters": "" if model.context is None else f"num_ctx {model.context}",
        "template": "",
        "details": _DETAILS,
        "model_info": info,
        "capabilities": ["completion"],
        "modified_at": model.changed,
    }


def _entry(model: LlmModel) -> dict[str, Any]:
    name = model.name if ":" in model.name else f"{model.name}{LATEST}"
    return {"name": name, "model": name, "size": 0, "digest": "", "details": _DETAILS}
