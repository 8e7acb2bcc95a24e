"""Define a model's call and its answer, in a form that is the same for gRPC and HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from services.worker.adapters.shared_memory import Place
from services.worker.domain.split import Output
from tidegate.kernel.protocol.envelope import Buffer, CallKey

# Parameters that Triton adds to some answers, such as those of ensembles. A model never sets them.
_SET_BY_TRITON = frozenset({"sequence_id", "sequence_start", "sequence_end"})
_NO_PLACES: Mapping[str, Place] = {}


class ModelCall(NamedTuple):
    """One call of a model.

    - ``raw_key``: the serialized call key of the requests
    - ``rows``: the number of rows; 0 if the model has no batch axis
    - ``contents``: the bytes of each input that is not in shared memory, in pieces
    - ``parameters``: parameters to send in addition to those of the key
    - ``input_places``, ``output_places``: the places of tensors in shared memory, by name
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
    """Return True if an answer's parameter of this name comes from the model, False if from Triton."""
    return not name.startswith("triton_") and name not in _SET_BY_TRITON
