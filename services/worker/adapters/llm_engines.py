"""Find vLLM's environment, and the credential of an upstream, on this host."""

from __future__ import annotations

import os
import re
from pathlib import Path

from services.worker.domain import llm_plan
from tidegate.kernel.errors import ModelFailed
from tidegate.kernel.protocol.models import DeploymentSpec, Version

# The environment variable in which the model gets the upstream's credential.
# `services/worker/runtimes/llm/upstream.py` reads it.
CREDENTIAL = "TIDEGATE_UPSTREAM_CREDENTIAL"
# A Deployment may name one of these environment variables of the worker as its upstream's credential. It
# cannot name any other variable of the worker, such as a password.
USABLE = re.compile(r"(?!TIDEGATE_)(\w+_API_KEY|UPSTREAM_\w+)")
MAX_BYTES = 16 * 1024


def needs_vllm(version: Version, deployment: DeploymentSpec) -> bool:
    """Return True if vLLM must run the version. Raise ModelFailed if no engine can run it."""
    return version.format == "llm" and llm_plan.engine_of(version, deployment) == "vllm"


def vllm_python(runtime: Path) -> Path:
    """Return the Python of vLLM's environment. Raise ModelFailed, with the remedy, if it is not installed."""
    folder = runtime / "engines" / "vllm"
    if not (folder / ".stamp").exists():
        raise ModelFailed(
            f"vLLM is not installed on this host: {folder} has no complete environment. Run `make vllm` "
            "on the host."
        )
    return folder / "bin" / "python"


def secrets(deployment: DeploymentSpec, folder: Path) -> dict[str, str]:
    """Return the variable with the upstream's credential; empty if the Deployment names none.

    ``folder``: a Deployment may name only files in this folder. Raises ModelFailed, without the secret in its
    message, if the named credential is missing or unusable.
    """
    spec = deployment.upstream or deployment.llm
    place = spec.credential if spec is not None else None
    if place is None:
        return {}
    kind, _, name = place.partition(":")
    value = _variable(name) if kind == "env" else _file(Path(name), folder)
    if not value or not value.isascii() or not value.isprintable():
        raise ModelFailed(f"The credential {place} is empty, or is not one line of printable ASCII text.")
    return {CREDENTIAL: value}


def _variable(name: str) -> str:
    if not USABLE.fullmatch(name):
        raise ModelFailed(
            f"The variable {name} is not allowed as a credential. Use a variable with a name that ends in "
            "_API_KEY or begins with UPSTREAM_, and set it where the stack is started."
        )
    if name not in os.environ:
        raise ModelFailed(
            f"The worker has no variable {name} for the upstream's credential. Set the variable where "
            "the stack is started, and restart the stack: `tidegate down`, `tidegate up`."
        )
    return os.environ[name].strip()


def _file(path: Path, folder: Path) -> str:
    try:
        real = path.resolve(strict=True)
        if not real.is_relative_to(folder.resolve()):
            raise ModelFailed(
                f"The credential's file {path} is not in {folder}. Put it there (`chmod 600`), or set "
                "TIDEGATE_CREDENTIALS_DIR."
            )
        if real.stat().st_size > MAX_BYTES:
            raise ModelFailed(f"The credential's file {path} has more than {MAX_BYTES} bytes.")
        return real.read_text().strip()
    except (OSError, UnicodeDecodeError) as problem:
        reason = getattr(problem, "strerror", None) or "it is no text"
        raise ModelFailed(f"The credential's file {path} cannot be read: {reason}.") from None
