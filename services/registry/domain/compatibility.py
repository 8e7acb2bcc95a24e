"""Compare the signatures of two versions, and name the changes that break callers. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tidegate.kernel.errors import Conflict
from tidegate.kernel.protocol.models import Signature, TensorSpec, Version

REASON = "breaking_change"


def differences(before: Signature, after: Signature) -> list[str]:
    """Return what a caller of ``before`` finds broken in ``after``, each as a phrase; empty: nothing.

    Wider is compatible: an input that takes more, an output that is new, an optional input, a larger batch.
    """
    found = _batching(before, after)
    found += _inputs(before.inputs, after.inputs)
    found += _outputs(before.outputs, after.outputs)
    if before.decoupled != after.decoupled:
        found.append(
            f"it is {'now' if after.decoupled else 'no longer'} decoupled (many answers to a request)"
        )
    return found


def check(held: Sequence[Version], after: Signature | None, *, breaking: bool) -> None:
    """Raise Conflict if a new version breaks callers of the latest one, unless ``breaking`` accepts that.

    Versions without a signature are not compared.
    """
    before = next((v for v in sorted(held, key=lambda v: -v.number) if v.signature is not None), None)
    if breaking or after is None or before is None or before.signature is None:
        return
    if found := differences(before.signature, after):
        raise Conflict(
            f"The signature breaks callers of version {before.number} of model {before.model!r}: "
            f"{'; '.join(found)}. If that is intended, say so with breaking=true (`tidegate deploy "
            "--breaking`); else serve it under another name.",
            reason=REASON,
        )


def _batching(before: Signature, after: Signature) -> list[str]:
    was, now = before.max_batch_size, after.max_batch_size
    if bool(was) != bool(now):
        return [f"its tensors have {'now a' if now else 'no longer a'} batch axis"]
    return [f"max_batch_size is {now}, was {was}"] if now < was else []


def _inputs(before: Sequence[TensorSpec], after: Sequence[TensorSpec]) -> list[str]:
    old, new = _by_name(before), _by_name(after)
    found = [f"input {name!r} is removed" for name in old if name not in new]
    for name, tensor in new.items():
        if name not in old:
            if not tensor.optional:
                found.append(f"input {name!r} is new and required")
            continue
        found += _changed("input", old[name], tensor, narrowed=_takes_less)
        if old[name].optional and not tensor.optional:
            found.append(f"input {name!r} is now required")
    return found


def _outputs(before: Sequence[TensorSpec], after: Sequence[TensorSpec]) -> list[str]:
    old, new = _by_name(before), _by_name(after)
    found = [f"output {name!r} is removed" for name in old if name not in new]
    for name, tensor in old.items():
        if name in new:
            # An answer of a known size may become no other one; of any size, it may become fixed.
            found += _changed("output", tensor, new[name], narrowed=lambda was, now: was not in (-1, now))
    return found


def _changed(
    role: str, old: TensorSpec, new: TensorSpec, *, narrowed: Callable[[int, int], bool]
) -> list[str]:
    if old.datatype != new.datatype:
        return [f"{role} {old.name!r} is {new.datatype}, was {old.datatype}"]
    same_rank = len(old.shape) == len(new.shape)
    if not same_rank or any(narrowed(was, now) for was, now in zip(old.shape, new.shape, strict=True)):
        return [f"{role} {old.name!r} has shape {new.shape}, had {old.shape}"]
    return []


def _takes_less(was: int, now: int) -> bool:
    return now not in (-1, was)


def _by_name(tensors: Sequence[TensorSpec]) -> dict[str, TensorSpec]:
    return {tensor.name: tensor for tensor in tensors}
