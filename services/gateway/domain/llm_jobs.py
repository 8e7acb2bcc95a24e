"""Requests to language models that run as jobs, and their answers. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from services.gateway.domain.contract import Decoded
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.envelope import Buffer, Tensor, call_key
from tidegate.kernel.protocol.llm import EVENTS, META, REQUEST, LlmRequest, Meta
from tidegate.kernel.protocol.tensors import DATATYPES, pack_strings, unpack_strings

# The member of a job's ``ask`` that has the path of its request. Only jobs for language models have it.
PATH = "llm"
_KEY = call_key((Tensor(REQUEST, DATATYPES["BYTES"], (1,)),), (), {})


class LlmJobAnswer(NamedTuple):
    """The answer of an engine to a job: its HTTP status and its JSON body."""

    status: int
    body: bytes


def check_body(body: Mapping[str, Any]) -> None:
    """Raise BadRequest if a request cannot run as a job, because it wants a stream."""
    if body.get("stream"):
        raise BadRequest(
            "a job has one answer, so it cannot stream: leave out 'stream', or leave out the header "
            "Prefer and read the stream"
        )


def decoded(path: str, body: dict[str, Any]) -> Decoded:
    """Return a request to a language model in the form that jobs take."""
    raw = LlmRequest(path, body).to_bytes()
    return Decoded("", 0, _KEY, [pack_strings([raw])], None, False)


def ask_of(path: str) -> dict[str, Any]:
    """Return the ``ask`` of a job for a language model."""
    return {PATH: path}


def is_llm(ask: Mapping[str, Any]) -> bool:
    """Return True if a job's ``ask`` says that it is a request to a language model."""
    return PATH in ask


def read_answer(outputs: Sequence[Tensor], data: Sequence[Buffer]) -> LlmJobAnswer:
    """Return the answer in a job's result. Raises ValueError if it has none."""
    found = {tensor.name: raw for tensor, raw in zip(outputs, data, strict=True)}
    if EVENTS not in found or META not in found:
        raise ValueError(f"it has the outputs {sorted(found)}, not {EVENTS} and {META}")
    events, metas = unpack_strings(found[EVENTS]), unpack_strings(found[META])
    if len(events) != 1 or len(metas) != 1:
        raise ValueError(f"it has {len(events)} events and {len(metas)} facts instead of one of each")
    return LlmJobAnswer(Meta.from_bytes(metas[0]).status, events[0])
