"""Choose the largest GGUF file of a model that fits into memory, because it is the most exact. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tidegate.kernel.protocol.gguf import GgufHeader, context_of, kv_bytes_per_token, kv_tokens_of

# The bytes of memory that an engine needs in addition to weights and KV cache. They are for code, buffers,
# and the Python process in Triton.
OVERHEAD = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Candidate:
    """A GGUF file, and the bytes of memory that a replica with it needs."""

    name: str
    weights: int
    kv: int

    @property
    def total(self) -> int:
        """Return the sum of weights, KV cache and overhead in bytes."""
        return self.weights + self.kv + OVERHEAD


@dataclass(frozen=True, slots=True)
class Fit:
    """The file to serve, or None if no file fits. ``reasons``: why each file was chosen or not."""

    chosen: Candidate | None
    reasons: dict[str, str]


def candidate(name: str, size: int, header: GgufHeader, slots: int, context: int | None) -> Candidate:
    """Return a file as a candidate, with the memory that a replica with this file needs.

    ``size``: bytes of the file. ``slots``: the number of engine slots, which is how many requests run at the
    same time. ``context``: the most tokens of a prompt and its answer together. If ``context`` is None, use
    the smaller of two limits: the limit in the file's header, and Tidegate's default.
    """
    tokens = kv_tokens_of(context_of(header, context), slots, stated=context is not None)
    return Candidate(name, size, tokens * kv_bytes_per_token(header))


def choose(candidates: Sequence[Candidate], memory: int) -> Fit:
    """Return the largest file that fits into ``memory`` bytes, and why other files are not served."""
    able = [each for each in candidates if each.total <= memory]
    best = max(able, key=lambda each: (each.weights, each.name), default=None)
    reasons = {}
    for each in candidates:
        if each is best:
            reasons[each.name] = "chosen: the largest that fits"
        elif each.total > memory:
            reasons[each.name] = f"needs {(each.total - memory) / 2**20:.0f} MiB more than is available"
        else:
            reasons[each.name] = f"smaller than {best.name if best else 'the chosen one'}, so less exact"
    return Fit(best, reasons)
