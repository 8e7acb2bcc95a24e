"""Sequences of a stateful model: its configuration, the parameters of requests, and Triton's errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tidegate.kernel.errors import BadRequest, SequenceLost
from tidegate.kernel.protocol.models import SequenceSpec

ID, START, END = "sequence_id", "sequence_start", "sequence_end"
PARAMETERS = frozenset({ID, START, END})
# A part of Triton's error for a request to a sequence that was not started.
START_FLAG = "must specify the START flag"
# Triton's idle time of sequences in microseconds, if a model's configuration does not set it.
DEFAULT_IDLE_US = 1_000_000


class SequenceMark(NamedTuple):
    """The parameters that name a request's sequence, and say if the request starts or ends it."""

    id: int | str
    start: bool
    end: bool

    def parameters(self) -> dict[str, Any]:
        """Return the sequence as parameters of a request."""
        return {ID: self.id, START: self.start, END: self.end}


def read_mark(parameters: Mapping[str, Any]) -> SequenceMark | None:
    """Return the sequence that a request's parameters state; None: no sequence.

    The parameters are not checked here, because a gateway has already checked them.
    """
    id_ = parameters.get(ID)
    if not id_:
        return None
    return SequenceMark(id_, bool(parameters.get(START)), bool(parameters.get(END)))


def not_started(mark: SequenceMark, model: str) -> BadRequest:
    """Return the error for a sequence that was not started, in Triton's words."""
    return BadRequest(
        f"inference request for sequence {mark.id} to model '{model}' {START_FLAG} on the first request of "
        "the sequence"
    )


def lost(mark: SequenceMark, model: str, why: str) -> SequenceLost:
    """Return the error for a sequence that lost its state. The text ends like Triton's own error."""
    return SequenceLost(
        f"the state of the sequence is gone, because {why}: start the sequence again. "
        f"{not_started(mark, model).message}"
    )


def spec_of(config: Any) -> SequenceSpec | None:
    """Return the sequences that a ``ModelConfig`` of Triton declares; None if it declares none.

    Also return None for ``iterative_sequence``: such a model creates its sequences itself, so its requests
    may go to any replica.
    """
    if not config.HasField("sequence_batching"):
        return None
    batching = config.sequence_batching
    if getattr(batching, "iterative_sequence", False):
        return None
    idle_ms = (batching.max_sequence_idle_microseconds or DEFAULT_IDLE_US) / 1e3
    if batching.HasField("oldest"):
        slots = batching.oldest.max_candidate_sequences or config.max_batch_size
        return SequenceSpec(strategy="oldest", slots=max(1, slots), idle_ms=idle_ms)
    return SequenceSpec(strategy="direct", slots=max(1, config.max_batch_size), idle_ms=idle_ms)


def tightest(specs: Sequence[SequenceSpec]) -> SequenceSpec | None:
    """Return the lowest limits of the stateful models in an ensemble; None if no model is stateful."""
    if not specs:
        return None
    slots, idle_ms = min(spec.slots for spec in specs), min(spec.idle_ms for spec in specs)
    return SequenceSpec(strategy=specs[-1].strategy, slots=slots, idle_ms=idle_ms)
