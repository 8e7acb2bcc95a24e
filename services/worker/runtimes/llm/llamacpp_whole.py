"""Join the events of a stream into the answer of a request without ``stream``. Pure.

llama.cpp can stop a cancelled stream after any token. For a request without a stream, it checks only once a
second whether the caller still waits. So the engine always streams, and this module joins the events.
"""

from __future__ import annotations

import json
from typing import Any

from llamacpp_events import Event, encoded, usage_of
from llamacpp_resume import is_ids

# If a request has one of these members, its answer has more than text. Then the engine must make the whole
# answer.
_MORE_THAN_TEXT = (
    "tools", "functions", "logprobs", "echo", "suffix", "best_of", "n_probs", "return_tokens", "verbose",
    "timings_per_token", "return_progress",
)  # fmt: skip


def can_join(body: dict[str, Any]) -> bool:
    """Return True if the answer to a request is one text, so that its events can be joined."""
    if any(body.get(key) for key in _MORE_THAN_TEXT) or body.get("n") not in (None, 1):
        return False
    prompt = body.get("prompt")
    return "messages" in body or isinstance(prompt, str) or is_ids(prompt)


class WholeAnswer:
    """The whole answer, made from the events of a stream."""

    def __init__(self) -> None:
        self._parts: dict[str, list[str]] = {}
        self._last: Event = {}
        self._reason: str | None = None

    def add(self, text: str) -> None:
        """Add the next event of the stream."""
        event = json.loads(text)
        self._last |= event
        for choice in event.get("choices", ()):
            for key, text in (choice.get("delta") or {"text": choice.get("text")}).items():
                if isinstance(text, str) and key != "role":
                    self._parts.setdefault(key, []).append(text)
            self._reason = choice.get("finish_reason") or self._reason

    def emission(self) -> tuple[list[bytes], dict[str, Any]]:
        """Return the whole answer as one event, and its facts. An engine's error is returned unchanged."""
        if "error" in self._last:
            error = {"error": self._last["error"]}
            return [encoded(error)], {"status": int(error["error"].get("code") or 500)}
        texts = {key: "".join(parts) for key, parts in self._parts.items()}
        whole = {key: value for key, value in self._last.items() if key != "prompt_progress"}
        if whole["object"] == "chat.completion.chunk":
            whole["object"] = "chat.completion"
            message = {"role": "assistant", "content": "", **texts}
            choice = {"finish_reason": self._reason, "index": 0, "message": message}
        else:
            text = texts.get("text", "")
            choice = {"text": text, "index": 0, "logprobs": None, "finish_reason": self._reason}
        whole["choices"] = [choice]
        return [encoded(whole)], {"usage": usage_of(whole)}
