"""A call of a model and its answer, whichever way they go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from services.worker.adapters.shared_memory import Place
from services.worker.domain.split import Output
from tidegate.kernel.protocol.envelope import Buffer, CallKey

# Triton adds these to some answers, such as those of ensembles. A model never sets them.
_SET_BY_TRITON = frozenset({"sequence_id", "sequence_start", "sequence_end"})
_NO_PLACES: Mapping[str, Place] = {}


class ModelCall(NamedTuple):
    """One call of a model.

    ``raw_key`` is ``key`` as the requests brought it. ``rows`` is 0 without a batch axis. ``contents`` are
    the bytes of each input, in pieces, without the inputs that have a place in shared memory. ``parameters``
    come beside those of the key.
    """

    raw_key: bytes
    key: CallKey
    rows: int
    contents: list[list[Buffer]]
    parameters: Mapping[str, str]
    input_places: Mapping[str, Place] = _NO_PLACES
    output_places: Mapping[str, Place] = _NO_PLACES


class ModelAnswer(NamedTuple):
    """The outputs of a call, and the parameters that the model set in its answer."""

    outputs: list[Output]
    parameters: dict[str, Any]


def set_by_model(name: str) -> bool:
    """Return True if the model, not Triton, sets an answer's parameter of this name."""
    return not name.startswith("triton_") and name not in _SET_BY_TRITON
