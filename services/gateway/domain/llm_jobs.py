"""Jobs of language models: their requests and their answers. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from services.gateway.domain.contract import Decoded
from services.gateway.domain.llm.estimate import estimate
from services.gateway.domain.llm.openai_events import EventFilter
from services.gateway.domain.llm.refusal import check_waits
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.envelope import Buffer, Tensor, call_key
from tidegate.kernel.protocol.llm import EVENTS, KV_TOKENS, META, REQUEST, LlmRequest, Meta
from tidegate.kernel.protocol.tensors import DATATYPES, pack_strings, unpack_strings

# Names in ``ask``, the parameters of a job. Only jobs for language models have them: the API's URL path, and
# the model's name as the caller sent it.
PATH, MODEL = "llm", "llm_model"
_INPUTS = (Tensor(REQUEST, DATATYPES["BYTES"], (1,)),)


class LlmJobAnswer(NamedTuple):
    """The answer of an engine to a job: its HTTP status and its JSON body."""

    status: int
    body: bytes


def check_body(body: Mapping[str, Any]) -> str:
    """Return the name of the model in a request body.

    Raise BadRequest if the body names no model, or has ``stream`` or ``background``.
    """
    if body.get("stream"):
        raise BadRequest(
            "a job has one answer, so it cannot stream: leave out 'stream', or leave out the header "
            "Prefer and read the stream"
        )
    check_waits(body)
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise BadRequest("'model' must be the name of a model: GET /v1/models lists all models")
    return model


def decoded(path: str, body: dict[str, Any], context: int | None) -> Decoded:
    """Return a job's request to a language model as input tensors.

    ``context``: the model's context length in tokens; None if unknown.
    """
    key = call_key(_INPUTS, (), {KV_TOKENS: estimate(path, body, context).total})
    return Decoded("", 0, key, [pack_strings([LlmRequest(path, body).to_bytes()])], None, False)


def ask_of(path: str, model: str) -> dict[str, Any]:
    """Return the parameters (``ask``) of a job for a language model: the API's path and the model's name."""
    return {PATH: path, MODEL: model}


def is_llm(ask: Mapping[str, Any]) -> bool:
    """Return True if a job with this ``ask`` is a request to a language model."""
    return PATH in ask


def read_answer(outputs: Sequence[Tensor], data: Sequence[Buffer], ask: Mapping[str, Any]) -> LlmJobAnswer:
    """Return the answer in a job's result. Raises ValueError if the result has no answer."""
    found = {tensor.name: raw for tensor, raw in zip(outputs, data, strict=True)}
    if EVENTS not in found or META not in found:
        raise ValueError(f"it has the outputs {sorted(found)}, not {EVENTS} and {META}")
    events, metas = unpack_strings(found[EVENTS]), unpack_strings(found[META])
    if len(events) != 1 or len(metas) != 1:
        raise ValueError(
            f"it has {len(events)} values in {EVENTS} and {len(metas)} in {META}, not one in each"
        )
    event = EventFilter(ask[MODEL], usage=True).named(events[0])
    return LlmJobAnswer(Meta.from_bytes(metas[0]).status, event)
