"""Decide whether an upload is a registered version or a new one, and whether it is accepted."""

from __future__ import annotations

from collections.abc import Sequence

from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.models import Format, Signature, Version

_EXAMPLE = (
    '{"inputs": [{"name": "x", "datatype": "FP32", "shape": [4]}], '
    '"outputs": [{"name": "y", "datatype": "FP32", "shape": [1]}], "max_batch_size": 8}'
)


def already(
    held: Sequence[Version],
    artifact: str,
    format_: Format,
    requirements: Sequence[str],
    signature: Signature | None,
) -> Version | None:
    """Return the newest version that has this artifact, format, requirements and signature; None: no one has.

    A signature that a version was given after its registration is no difference to an upload without one.
    """
    for version in sorted(held, key=lambda each: each.number, reverse=True):
        same = (version.artifact_sha256, version.format, version.requirements) == (
            artifact, format_, list(requirements),
        )  # fmt: skip
        if same and signature in (version.signature, None):
            return version
    return None


def check_described(format_: Format, given: Signature | None, *, by_itself: bool = False) -> None:
    """Raise BadRequest for a model whose inputs and outputs nothing says. ``by_itself``: its code may."""
    if given is not None or by_itself or format_ not in ("python", "torchscript"):
        return
    kind = "A Python model" if format_ == "python" else "A TorchScript file"
    also = ", or define auto_complete_config in its class" if format_ == "python" else ""
    raise BadRequest(
        f"{kind} does not say what its inputs and outputs are: give a signature "
        f"(`tidegate deploy --signature FILE.json`){also}. Such a file holds, for example: {_EXAMPLE}"
    )


def check_size(size: int | None, limit: int) -> str | None:
    """Return why an artifact of this size is not taken; None: it is, or its size is not known."""
    if size is None or size <= limit:
        return None
    return f"The artifact has {size} bytes, at most {limit} are accepted (TIDEGATE_MAX_ARTIFACT_BYTES)."
