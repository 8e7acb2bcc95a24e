"""Read token counts and the finish reason from the last answers of a language model. Pure."""

from __future__ import annotations

from typing import Any

import orjson

from services.worker.domain.samples import SampledStream
from tidegate.kernel.profiles.texts import TextAnswer
from tidegate.kernel.protocol.llm import EVENTS, META, Meta
from tidegate.kernel.protocol.tensors import unpack_strings

_LONGEST_REASON = 64


def text_answer(sample: SampledStream) -> TextAnswer:
    """Return the token counts and the finish reason of an answer. Raise ValueError for unreadable outputs."""
    usage: tuple[int, int, int] | None = None
    reason: str | None = None
    for outputs in sample.answers:
        for output in outputs:
            if output.name == META:
                for raw in unpack_strings(output.raw):
                    usage = Meta.from_bytes(raw).usage or usage
            elif output.name == EVENTS:
                for raw in unpack_strings(output.raw):
                    reason = _finish_reason(raw) or reason
    prompt, answer = usage[:2] if usage else (None, None)
    return TextAnswer(prompt, answer, reason)


def _finish_reason(event: bytes) -> str | None:
    if b"finish_reason" not in event:
        return None
    try:
        document: Any = orjson.loads(event)
        found = document["choices"][0]["finish_reason"]
    except (orjson.JSONDecodeError, KeyError, IndexError, TypeError):
        return None
    return found[:_LONGEST_REASON] if isinstance(found, str) else None
