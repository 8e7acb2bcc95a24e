"""The sequences that a replica keeps: their requests in order, and their ids in the model server. Pure."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from services.worker.domain.backlog import QueuedRequest
from tidegate.kernel.errors import TidegateError
from tidegate.kernel.protocol.envelope import CallKey, Request, call_key
from tidegate.kernel.protocol.sequences import ID, SequenceMark
from tidegate.kernel.protocol.tenant import caller_of, endpoint_of

# A worker remembers at most this many ids of started requests, and at most this many lost sequences.
BEGUN_KEPT = LOST_KEPT = 10_000
_INT = 2**63


class SequenceKey(NamedTuple):
    """The caller of a sequence, the endpoint that the caller used, and the id that the caller chose."""

    caller: str
    endpoint: str
    id: int | str


@dataclass(slots=True, eq=False)
class KeptSequence:
    """A sequence of this replica. ``model_id`` is its id in the model server.

    ``current``: its request that is in the model or runs next. ``waiting``: the requests after ``current``.
    ``error``: the failure of its last request. ``lost``: True if the model server has ended, so that the
    state of the sequence is lost.
    """

    key: SequenceKey
    model_id: int | str
    waiting: deque[QueuedRequest] = field(default_factory=deque)
    current: QueuedRequest | None = None
    error: TidegateError | None = None
    lost: bool = False


class SequenceTable:
    """The sequences of a replica, and those that it has lost."""

    def __init__(self) -> None:
        self.kept: dict[SequenceKey, KeptSequence] = {}
        self._model_ids: dict[int | str, SequenceKey] = {}
        self._lost: OrderedDict[SequenceKey, str] = OrderedDict()
        self._begun: OrderedDict[bytes, None] = OrderedDict()

    def open(self, key: SequenceKey) -> KeptSequence:
        """Return a sequence; create it if it is new.

        The model sees the id that the caller chose. If another caller's sequence already has the same id, the
        new sequence gets a different id in the model server.
        """
        sequence = self.kept.get(key)
        if sequence is None:
            model_id = key.id
            while model_id in self._model_ids:
                model_id = _next_id(model_id)
            sequence = self.kept[key] = KeptSequence(key, model_id)
            self._model_ids[model_id] = key
            self._lost.pop(key, None)
        return sequence

    def close(self, sequence: KeptSequence) -> None:
        """Forget a sequence that has ended."""
        if self.kept.get(sequence.key) is sequence:
            del self.kept[sequence.key]
            del self._model_ids[sequence.model_id]

    def lose(self, why: str) -> list[KeptSequence]:
        """Remove and return all sequences, because their state is lost. Remember the reason ``why``."""
        gone = list(self.kept.values())
        for sequence in gone:
            sequence.lost = True
            self._lost[sequence.key] = why
        while len(self._lost) > LOST_KEPT:
            self._lost.popitem(last=False)
        self.kept.clear()
        self._model_ids.clear()
        return gone

    def why_lost(self, key: SequenceKey) -> str | None:
        """Return why a sequence was lost; None if it was not lost."""
        return self._lost.get(key)

    def begin(self, id_: bytes) -> None:
        """Remember that the call of a request has begun."""
        self._begun[id_] = None
        if len(self._begun) > BEGUN_KEPT:
            self._begun.popitem(last=False)

    def has_begun(self, id_: bytes) -> bool:
        """Return True if the call of a request has begun here."""
        return id_ in self._begun


def key_of(request: Request, mark: SequenceMark) -> SequenceKey:
    """Return the key of a request's sequence."""
    return SequenceKey(caller_of(request.tenant), endpoint_of(request.tenant), mark.id)


def with_model_id(request: Request, key: CallKey, model_id: int | str) -> Request:
    """Return the request with ``model_id`` in its parameters, instead of the id that the caller chose."""
    if key.parameters.get(ID) == model_id:
        return request
    parameters: dict[str, Any] = {**key.parameters, ID: model_id}
    return request._replace(key=call_key(key.inputs, key.outputs, parameters))


def _next_id(id_: int | str) -> int | str:
    """Return another id of the same type, one that callers rarely choose."""
    return (id_ + _INT) % (2 * _INT - 1) + 1 if isinstance(id_, int) else f"{id_}'"
