"""A conversation with a language model: the messages so far, and the next answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tidegate.cli.waiting_line import WaitingLine
from tidegate.client import ChatResult, Client, Usage
from tidegate.kernel.errors import TidegateError


@dataclass(frozen=True, slots=True)
class Turn:
    """One answer. ``first_s``: seconds until its first text. ``pieces``: the number of events with text.

    ``cancelled``: True if Ctrl-C ended the answer.
    """

    result: ChatResult
    first_s: float | None
    seconds: float
    pieces: int
    cancelled: bool = False

    @property
    def tokens(self) -> int:
        """Return the answer's number of tokens.

        If the engine does not report this number, return the number of events with text.
        """
        usage = self.result.usage
        return usage.completion_tokens if usage else self.pieces

    @property
    def tokens_per_s(self) -> float | None:
        """Return the tokens per second after the first token; None for an answer of fewer than two tokens."""
        if self.first_s is None or self.tokens < 2 or self.seconds <= self.first_s:
            return None
        return (self.tokens - 1) / (self.seconds - self.first_s)

    def stats(self) -> str:
        """Return the figures of ``--stats`` in one line."""
        usage = self.result.usage or Usage()
        parts = []
        if self.first_s is not None:
            parts.append(f"first token after {self.first_s:.2f} s")
        if (rate := self.tokens_per_s) is not None:
            parts.append(f"{rate:.1f} tokens/s")
        parts.append(f"{self.tokens} tokens in {self.seconds:.2f} s")
        if self.result.usage:
            cached = f", {usage.cached_tokens} of them cached" if usage.cached_tokens else ""
            parts.append(f"prompt {usage.prompt_tokens} tokens{cached}")
        return "; ".join(parts)

    def document(self, model: str) -> dict[str, Any]:
        """Return the document of ``--json``."""
        result, usage = self.result, self.result.usage
        return {
            "model": model,
            "text": result.text,
            "message": result.message,
            "finish_reason": result.finish_reason,
            "usage": usage.document() if usage else None,
            "first_token_s": self.first_s,
            "tokens_per_s": self.tokens_per_s,
            "seconds": self.seconds,
            "cancelled": self.cancelled,
            "request_id": result.request_id,
        }


class Conversation:
    """A conversation with a model: the messages so far. ``options`` are fields of OpenAI's request."""

    def __init__(self, client: Client, model: str, system: str | None, options: Mapping[str, Any]) -> None:
        self._client = client
        self.model = model
        self.options = dict(options)
        self.system = system
        self.messages: list[dict[str, Any]] = []

    def restart(self) -> None:
        """Remove all messages. The system prompt stays, because ``self.system`` holds it."""
        self.messages = []

    def ask(self, text: str, write: Callable[[str], None], waiting: WaitingLine) -> Turn:
        """Send a message and pass each piece of the answer to ``write``. Ctrl-C cancels the answer.

        Keep the message and its answer for the next request, even if Ctrl-C cut the answer short. After an
        error or an empty answer, do not keep the message.
        """
        system = [{"role": "system", "content": self.system}] if self.system else []
        question = {"role": "user", "content": text}
        turn = self._answered([*system, *self.messages, question], write, waiting)
        if turn.result.text or turn.result.tool_calls:
            self.messages += [question, turn.result.message]
        return turn

    def _answered(
        self, messages: list[dict[str, Any]], write: Callable[[str], None], waiting: WaitingLine
    ) -> Turn:
        began, first_s, pieces, cancelled = time.perf_counter(), None, 0, False
        result = ChatResult([], None, self.model, "", "")
        with waiting:
            try:
                with self._client.chat(self.model, messages, stream=True, **self.options) as stream:
                    try:
                        for chunk in stream:
                            if not chunk.text:
                                continue
                            if first_s is None:
                                first_s = time.perf_counter() - began
                                waiting.stop()
                            pieces += 1
                            write(chunk.text)
                    finally:
                        result = stream.so_far
            except KeyboardInterrupt:
                cancelled = True
        return Turn(result, first_s, time.perf_counter() - began, pieces, cancelled)


def no_such_model(client: Client, name: str) -> str:
    """Return the error message for an unknown model. It suggests similar names, or lists up to ten models."""
    import difflib

    try:
        known = sorted({str(each["name"]) for each in client.models()})
    except TidegateError:
        known = []
    near = difflib.get_close_matches(name, known, 3, 0.5)
    if near:
        remedy = f"Did you mean {' or '.join(near)}?"
    elif known:
        remedy = f"The models are: {', '.join(known[:10])}{' and others' if len(known) > 10 else ''}."
    else:
        remedy = "No model is deployed. Deploy one: tidegate deploy MODEL.gguf"
    return f"There is no model {name!r}. {remedy}"
