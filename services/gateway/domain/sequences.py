"""Sequences of stateful models: their parameters, keys, replicas and errors. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, NamedTuple

from tidegate.kernel.errors import BadRequest, Overloaded, Unavailable
from tidegate.kernel.protocol.bounded_json import shown
from tidegate.kernel.protocol.sequences import END, ID, START, SequenceMark

# Triton's sequence ids are unsigned 64-bit numbers.
_LARGEST_ID, _LONGEST_ID = 2**64 - 1, 128
# The model server ends an idle sequence by its own clock. So gateways remember the sequence this many ms
# longer than its idle limit, and do not forget it too early.
IDLE_MARGIN_MS = 250
# If a replica ends, its sequences are lost. Each of them is remembered for this many ms, so that its caller
# gets a clear error.
LOST_KEPT_MS = 120_000


class Place(NamedTuple):
    """The replica that has the state of a sequence. ``lost``: True if this replica has ended.

    ``token``: a random text, new for each start of the sequence. A late request from an earlier start has
    another token. So it cannot change the record of the present start.
    """

    deployment: str
    replica: str
    token: str
    lost: bool = False


class Times(NamedTuple):
    """The times that the store records for a sequence.

    ``busy_ms``: how long the present request may still take; 0: the request has ended. ``idle_ms``: how
    long the sequence may be idle.
    """

    busy_ms: int
    idle_ms: int


class SequenceSlots(NamedTuple):
    """A ready replica of a stateful model, and how many sequences it can keep."""

    name: str
    slots: int


def sequence_of(parameters: Mapping[str, Any]) -> SequenceMark | None:
    """Return the sequence that a request's parameters name; None if the id is missing, 0 or empty.

    Raise BadRequest for a value that Triton does not accept.
    """
    id_ = parameters.get(ID, 0)
    if type(id_) is int:
        if not 0 <= id_ <= _LARGEST_ID:
            raise BadRequest(f"parameter '{ID}' must be from 0 to 2**64 - 1, got {shown(id_)}")
    elif not isinstance(id_, str):
        raise BadRequest(f"parameter '{ID}' must be a whole number or a string, got {shown(id_)}")
    elif len(id_) > _LONGEST_ID:
        raise BadRequest(f"string correlation ID cannot be longer than {_LONGEST_ID} characters")
    for name in (START, END):
        if not isinstance(parameters.get(name, False), bool):
            raise BadRequest(f"parameter '{name}' must be a boolean, got {shown(parameters[name])}")
    if not id_:
        return None
    return SequenceMark(id_, parameters.get(START, False), parameters.get(END, False))


def key_of(endpoint: str, version: str, caller: str, id_: int | str) -> str:
    """Return the key of a sequence. It depends on the caller, so two callers can use the same id."""
    parts = (endpoint, version, caller, type(id_).__name__, str(id_))
    return blake2b("\x1f".join(parts).encode(), digest_size=16).hexdigest()


def store_away(model: str, mark: SequenceMark, retry_after_s: float) -> Unavailable:
    """Return the error for a sequence whose replica cannot be found, because the store does not answer."""
    what = (
        f"a sequence of model '{model}' cannot start" if mark.start else "the sequence's replica is not known"
    )
    return Unavailable(
        f"{what}, because the live store (Valkey), which has the replica of each sequence, does not answer. "
        f"Send the request again in {retry_after_s:g} s",
        reason="store_unavailable",
        retry_after_s=retry_after_s,
    )


def all_taken(model: str, replicas: int, slots: int, idle_ms: float) -> Overloaded:
    """Return the error for a sequence that cannot start.

    The ready replicas already keep as many sequences as they can.
    """
    return Overloaded(
        f"model '{model}' keeps {slots} sequences, the limit of the replicas that are ready ({replicas}). "
        "End a sequence, or raise max_replicas of the Deployment: tidegate policy NAME --set max_replicas=N",
        retry_after_s=max(1.0, idle_ms / 1e3),
    )
