"""The options of ``tidegate deploy`` for language models, as a part of the Deployment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tidegate.cli.exit_codes import UsageError
from tidegate.cli.llm_packages import adapter_path
from tidegate.cli.options import pairs

ENGINES = ("auto", "llamacpp", "vllm", "openai-url")


def llm_fields(
    *,
    engine: str | None,
    slots: int | None,
    context: int | None,
    arguments: Sequence[str] | None,
    adapters: Mapping[str, Path],
) -> dict[str, Any] | None:
    """Return the given options as fields of ``LlmSpec``; None if none is given. Raise UsageError."""
    if engine is not None and engine not in ENGINES:
        raise UsageError(f"--engine {engine}: choose one of {', '.join(ENGINES)}.")
    fields = {
        "engine": engine,
        "slots": slots,
        "context": context,
        "arguments": {key: value_of(text) for key, text in pairs("--engine-arg", arguments).items()} or None,
        "adapters": {name: adapter_path(name, path) for name, path in adapters.items()} or None,
    }
    return {key: value for key, value in fields.items() if value is not None} or None


def adapter_files(values: Sequence[str] | None) -> dict[str, Path]:
    """Return the files of ``--adapter NAME=PATH`` options by name. Raise UsageError."""
    return {name: Path(path) for name, path in pairs("--adapter", values).items()}


def value_of(text: str) -> str | int | float | bool:
    """Return the value of an engine's argument: true, false, a number, or else text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
