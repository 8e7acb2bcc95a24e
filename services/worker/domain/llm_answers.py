"""Read the one event of an answer that is not streamed, or the token counts of a stream. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import orjson

from services.worker.domain.split import Output
from tidegate.kernel.errors import BadRequest, ModelFailed, NotFound, PayloadTooLarge, TidegateError
from tidegate.kernel.protocol.envelope import Buffer
from tidegate.kernel.protocol.llm import EVENTS, META, Meta
from tidegate.kernel.protocol.tensors import pack_strings, unpack_strings

# HTTP statuses of a busy engine or provider. If the same request is sent later, it may succeed.
BUSY = frozenset({429, 503})
# The first and the longest pause before a retry, in seconds, if the engine's answer has no retry-after. With
# a retry-after, the pause is at least the first value, and at most ``LONGEST_PAUSE_S``.
PAUSES_S = (1.0, 30.0)
LONGEST_PAUSE_S = 600.0
_USAGE = re.compile(rb'"usage":\s*\[')
_BY_STATUS: dict[int, type[TidegateError]] = {404: NotFound, 413: PayloadTooLarge}


class NotOneEvent(ValueError):
    """Error for an answer without a stream: the engine sent no event, or more than one."""


class Collected(NamedTuple):
    """An answer without a stream: its only event, and facts such as the token counts.

    ``raw_meta``: the facts as JSON.
    """

    event: bytes
    meta: Meta
    raw_meta: bytes

    def outputs(self) -> list[Output]:
        """Return the event and the facts as the output tensors of one answer."""
        return [
            Output(EVENTS, "BYTES", (1,), pack_strings([self.event])),
            Output(META, "BYTES", (1,), pack_strings([self.raw_meta])),
        ]

    def parameters(self) -> dict[str, Any]:
        """Return the token counts as response parameters; empty if the engine reported none."""
        if self.meta.usage is None:
            return {}
        prompt, answer, _ = self.meta.usage
        return {"prompt_tokens": prompt, "completion_tokens": answer}


class TokenUsage:
    """The token counts of a stream. They are taken from the last chunk that has counts."""

    def __init__(self) -> None:
        self._meta: Buffer = b""

    def hear(self, outputs: Sequence[Output]) -> None:
        """Store the facts of a chunk if they contain token counts. Facts of earlier chunks are dropped."""
        for output in outputs:
            if output.name == META and _USAGE.search(output.raw):
                self._meta = output.raw

    def tokens(self) -> tuple[int, int, int]:
        """Return the numbers of prompt tokens, answer tokens, and cached prompt tokens."""
        try:
            return Meta.from_bytes(unpack_strings(self._meta)[0]).usage or (0, 0, 0)
        except (ValueError, LookupError, TypeError):
            return 0, 0, 0  # there are no readable counts


def collected(answers: Sequence[tuple[Buffer, Buffer]]) -> Collected:
    """Return the one event that the chunks of an answer contain, and the facts of all chunks.

    ``answers``: for each chunk, the packed events and the packed facts. Raises NotOneEvent if the chunks
    contain no event, or more than one.
    """
    events = [event for raw, _ in answers for event in unpack_strings(raw)]
    if len(events) != 1:
        raise NotOneEvent(f"the engine sent {len(events)} events instead of one")
    metas = [unpack_strings(raw)[0] for _, raw in answers]
    facts: dict[str, Any] = {}
    for meta in metas:  # the last value of each fact is kept
        facts |= {name: value for name, value in orjson.loads(meta).items() if value not in (None, [])}
    # Leave out the token ids. Only a stream needs them, to continue on another replica.
    raw = orjson.dumps({name: value for name, value in facts.items() if name not in ("prompt_ids", "ids")})
    return Collected(events[0], Meta.from_bytes(raw), raw)


def retry_pause_s(meta: Meta, tries: int) -> float | None:
    """Return the seconds to wait before a request to a busy engine is retried.

    Return None if the engine is not busy. ``tries``: the number of earlier retries.
    """
    if meta.status not in BUSY:
        return None
    if meta.retry_after_s is not None:
        return min(max(meta.retry_after_s, PAUSES_S[0]), LONGEST_PAUSE_S)
    return min(PAUSES_S[0] * float(1 << min(tries, 10)), PAUSES_S[1])


def refusal(found: Collected) -> TidegateError | None:
    """Return the error of a request that the engine refused; None if the engine did not refuse it."""
    status = found.meta.status
    if status < 400:
        return None
    message = error_message(found.event) or f"the engine refused the request with status {status}"
    if status >= 500:
        return ModelFailed(message)
    return _BY_STATUS.get(status, BadRequest)(message)


def error_message(event: bytes) -> str:
    """Return the message in an engine's error body; empty if there is none.

    A body that is not JSON is itself the message.
    """
    try:
        document = orjson.loads(event)
    except orjson.JSONDecodeError:
        return event.decode(errors="replace")
    error = document.get("error", document) if isinstance(document, dict) else document
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or ""
    return error if isinstance(error, str) else ""
