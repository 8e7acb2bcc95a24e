"""Decide if a registration is complete, and if it equals an existing version. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.models import Format, Signature, Version

_EXAMPLE = (
    '{"inputs": [{"name": "x", "datatype": "FP32", "shape": [4]}], '
    '"outputs": [{"name": "y", "datatype": "FP32", "shape": [1]}], "max_batch_size": 8}'
)


def same_version(
    stored: Sequence[Version],
    artifact: str,
    format_: Format,
    requirements: Sequence[str],
    signature: Signature | None,
    trusted: Sequence[str] = (),
) -> Version | None:
    """Return the newest version that equals a registration, or None.

    ``trusted``: the names that a pickle or skops file is allowed to import. ``signature`` None: signatures
    are not compared, because a stored version may have got its signature after its registration.
    """
    for version in sorted(stored, key=lambda each: each.number, reverse=True):
        same = (version.artifact_sha256, version.format, version.requirements, version.trusted) == (
            artifact, format_, list(requirements), list(trusted),
        )  # fmt: skip
        if same and signature in (version.signature, None):
            return version
    return None


_UNDESCRIBED: dict[Format, str] = {
    "python": "A Python model",
    "torchscript": "A TorchScript file",
    "oip": "The address of an upstream",
}


def check_has_signature(
    format_: Format, user_signature: Signature | None, *, describes_itself: bool = False
) -> None:
    """Raise BadRequest if the format needs a signature and the user has not sent one.

    ``describes_itself``: True if the model's code may return a signature. Then the user need not send one.
    """
    if user_signature is not None or describes_itself or format_ not in _UNDESCRIBED:
        return
    kind = _UNDESCRIBED[format_]
    also = ", or define auto_complete_config in the model's class" if format_ == "python" else ""
    raise BadRequest(
        f"{kind} does not declare inputs and outputs. Add a signature (`tidegate deploy --signature "
        f"FILE.json`){also}. An example of a signature file: {_EXAMPLE}"
    )


def size_problem(size: int | None, limit: int) -> str | None:
    """Return why an artifact of ``size`` bytes is rejected; None if it is accepted or its size is unknown."""
    if size is None or size <= limit:
        return None
    return f"The artifact has {size} bytes; the limit is {limit} (TIDEGATE_MAX_ARTIFACT_BYTES)."
