"""Convert the language-model options of ``tidegate deploy`` to fields of the Deployment."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tidegate.cli.exit_codes import UsageError
from tidegate.cli.llm_packages import adapter_path
from tidegate.cli.options import pairs
from tidegate.cli.upstream_options import check_header

# The default number of engine slots of a replica that calls an upstream. The number is high, because requests
# to an upstream need no engine memory on this host.
UPSTREAM_SLOTS = 64
_ONLY_UPSTREAM = (
    "upstream", "upstream_model", "credential", "credential_header", "requests_per_minute",
    "tokens_per_minute", "upstream_timeout_s",
)  # fmt: skip
ENGINES = ("auto", "llamacpp", "vllm", "openai-url")


def llm_fields(
    *,
    engine: str | None,
    slots: int | None,
    context: int | None,
    arguments: Sequence[str] | None,
    adapters: Mapping[str, Path],
    affinity_wait_ms: float | None = None,
    upstream: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Return the given options as fields of ``LlmSpec``; None if no option is given.

    ``upstream``: the options of an upstream, by field name. Raise UsageError for an unknown engine, for an
    engine argument that is not ``K=V``, or for a header that cannot carry a credential.
    """
    upstream = {key: value for key, value in (upstream or {}).items() if value is not None}
    if header := upstream.get("credential_header"):
        check_header(header)
    elif "credential" in upstream:
        # Clear the header: the Deployment may have one from an earlier deploy, for another credential.
        upstream["credential_header"] = None
    engine = engine or ("openai-url" if "upstream" in upstream else None)
    if engine is not None and engine not in ENGINES:
        raise UsageError(f"--engine {engine}: choose one of {', '.join(ENGINES)}.")
    fields = {
        "engine": engine,
        "slots": slots,
        "context": context,
        "affinity_wait_ms": affinity_wait_ms,
        "arguments": {key: value_of(text) for key, text in pairs("--engine-arg", arguments).items()} or None,
        "adapters": {name: adapter_path(name, path) for name, path in adapters.items()} or None,
    }
    given = {key: value for key, value in fields.items() if value is not None} | upstream
    if engine == "openai-url":
        given.setdefault("slots", UPSTREAM_SLOTS)
    elif engine is not None:
        # Clear the options of an upstream: the Deployment may have them from an earlier deploy.
        given |= dict.fromkeys(_ONLY_UPSTREAM)
    return given or None


@contextmanager
def upstream_artifact(address: str, model: str | None) -> Iterator[Path]:
    """Yield the path of a file that describes an upstream. The file is the artifact of a version.

    The file is deleted at the end of the ``with`` block.
    """
    with tempfile.TemporaryDirectory(prefix="tidegate-") as folder:
        path = Path(folder) / "upstream.json"
        path.write_text(json.dumps({"upstream": address, "model": model}) + "\n")
        yield path


def adapter_files(values: Sequence[str] | None) -> dict[str, Path]:
    """Parse ``--adapter NAME=PATH`` options as paths by name. Raise UsageError for other forms."""
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
