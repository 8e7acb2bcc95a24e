"""Compare the signatures of two versions, and describe the changes that break callers. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tidegate.kernel.errors import Conflict
from tidegate.kernel.protocol.models import Signature, TensorSpec, Version

REASON = "breaking_change"


def breaking_changes(before: Signature, after: Signature) -> list[str]:
    """Return the changes from ``before`` to ``after`` that break callers, each as a phrase.

    These changes break no caller: an input accepts more shapes, an output or an optional input is added, or
    the maximum batch grows.
    """
    changes = _batching(before, after)
    changes += _inputs(before.inputs, after.inputs)
    changes += _outputs(before.outputs, after.outputs)
    if before.decoupled != after.decoupled:
        changes.append(
            f"the model is {'now' if after.decoupled else 'no longer'} decoupled (many responses to a "
            "request)"
        )
    if (before.sequences is None) != (after.sequences is None):
        changes.append(
            f"the model {'now' if after.sequences else 'no longer'} keeps a state for each sequence "
            "(sequence_batching)"
        )
    return changes


def check(stored: Sequence[Version], after: Signature | None, *, breaking: bool) -> None:
    """Raise Conflict if ``after`` breaks callers of the latest version that has a signature.

    ``breaking`` True: the publisher allows breaking changes, so do not raise.
    """
    before = next((v for v in sorted(stored, key=lambda v: -v.number) if v.signature is not None), None)
    if breaking or after is None or before is None or before.signature is None:
        return
    if changes := breaking_changes(before.signature, after):
        raise Conflict(
            f"The signature breaks callers of version {before.number} of model {before.model!r}: "
            f"{'; '.join(changes)}. If you want this, deploy with `tidegate deploy --breaking` (in the API: "
            "breaking=true). Otherwise deploy under another model name.",
            reason=REASON,
        )


def _batching(before: Signature, after: Signature) -> list[str]:
    was, now = before.max_batch_size, after.max_batch_size
    if bool(was) != bool(now):
        return [f"the tensors {'now have a' if now else 'no longer have a'} batch axis"]
    return [f"max_batch_size is {now}, was {was}"] if now < was else []


def _inputs(before: Sequence[TensorSpec], after: Sequence[TensorSpec]) -> list[str]:
    old, new = _by_name(before), _by_name(after)
    changes = [f"input {name!r} is removed" for name in old if name not in new]
    for name, tensor in new.items():
        if name not in old:
            if not tensor.optional:
                changes.append(f"input {name!r} is new and required")
            continue
        changes += _changed("input", old[name], tensor, narrowed=_accepts_less)
        if old[name].optional and not tensor.optional:
            changes.append(f"input {name!r} is now required")
    return changes


def _outputs(before: Sequence[TensorSpec], after: Sequence[TensorSpec]) -> list[str]:
    old, new = _by_name(before), _by_name(after)
    changes = [f"output {name!r} is removed" for name in old if name not in new]
    for name, tensor in old.items():
        if name in new:
            # Callers can rely on a fixed size of an output, so that size must stay. A dynamic size (-1) can
            # become any size.
            changes += _changed("output", tensor, new[name], narrowed=lambda was, now: was not in (-1, now))
    return changes


def _changed(
    role: str, old: TensorSpec, new: TensorSpec, *, narrowed: Callable[[int, int], bool]
) -> list[str]:
    if old.datatype != new.datatype:
        return [f"{role} {old.name!r} is {new.datatype}, was {old.datatype}"]
    same_rank = len(old.shape) == len(new.shape)
    if not same_rank or any(narrowed(was, now) for was, now in zip(old.shape, new.shape, strict=True)):
        return [f"{role} {old.name!r} has shape {new.shape}, had {old.shape}"]
    return []


def _accepts_less(was: int, now: int) -> bool:
    return now not in (-1, was)


def _by_name(tensors: Sequence[TensorSpec]) -> dict[str, TensorSpec]:
    return {tensor.name: tensor for tensor in tensors}
