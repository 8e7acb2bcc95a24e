"""Continue a stream that another replica began: make the request, and convert its events. Pure."""

from __future__ import annotations

import json
from typing import Any

from llamacpp_events import Event, StreamEvents, Tokenize, encoded

# Members of a request. If a request has one of them, its stream cannot be continued from the tokens alone:
# the engine needs more state than the tokens, or the events contain more than text.
_STATEFUL = (
    "tools", "functions", "response_format", "grammar", "json_schema", "logprobs", "echo", "suffix",
    "best_of", "use_beam_search", "n_probs", "return_tokens", "t_max_predict_ms",
)  # fmt: skip
# A continuation does not copy these members of the original request. Some exist only in chats, and some apply
# only before the first token. The token limits are replaced by a new ``max_tokens``.
_OF_CHATS = (
    "messages", "max_completion_tokens", "max_tokens", "n_predict", "top_logprobs", "tool_choice",
    "parallel_tool_calls", "chat_template_kwargs", "add_generation_prompt", "reasoning_format",
    "continue_final_message", "reasoning_effort",
)  # fmt: skip
_LIMITS = ("max_completion_tokens", "max_tokens", "n_predict")


def can_continue(body: dict[str, Any]) -> bool:
    """Return True if a stream with this body can be continued after any of its tokens."""
    if any(body.get(key) for key in _STATEFUL) or body.get("n") not in (None, 1):
        return False
    prompt = body.get("prompt")
    return "messages" in body or isinstance(prompt, str) or is_ids(prompt)


def continuation(body: dict[str, Any], resume: dict[str, Any]) -> dict[str, Any]:
    """Return the body of a completion that continues a stream after its emitted tokens.

    ``max_tokens`` becomes the number of tokens that may still follow. If it is 0, the stream is already
    complete.
    """
    rest = {key: value for key, value in body.items() if key not in _OF_CHATS}
    limit = next((body[key] for key in _LIMITS if body.get(key) is not None), None)
    if limit is not None and limit >= 0:
        rest["max_tokens"] = max(0, limit - len(resume["emitted"]))
    return {**rest, "prompt": [*resume["prompt"], *resume["emitted"]], "stream": True}


class ResumedEvents:
    """Convert the events of a continued stream to the format of its first part: chat or completion."""

    def __init__(self, body: dict[str, Any], resume: dict[str, Any], tokenize: Tokenize, model: str) -> None:
        self._chat = "messages" in body
        self._keep_timings = bool(body.get("timings_per_token"))
        self._inner = StreamEvents({**body, "return_progress": False}, tokenize)
        self._prompt, self._before = len(resume["prompt"]), len(resume["emitted"])
        self._head = {"id": resume["id"], "created": resume["created"]}
        self._model = model

    def read(self, text: str) -> tuple[list[bytes], dict[str, Any]]:
        """Convert an event of the engine's completions to the caller's events. Also return its facts."""
        event = json.loads(text)
        if "error" in event:
            return [text.encode()], {"status": int(event["error"].get("code") or 500)}
        found, meta = self._inner.take(event)
        if meta.get("usage"):
            meta["usage"] = self._usage(meta["usage"])
        if found is None:
            return [], meta
        return [encoded(each) for each in self._events(found, meta)], meta

    def finished(self) -> tuple[list[bytes], dict[str, Any]]:
        """Return the last events of a stream that already has all its tokens, and their facts."""
        usage = [self._prompt, self._before, 0]
        event: Event = {"choices": [{"text": "", "index": 0, "logprobs": None, "finish_reason": "length"}]}
        event |= {"object": "text_completion", "model": self._model, "usage": {}}
        return [encoded(each) for each in self._events(event, {"usage": usage})], {"usage": usage}

    def _usage(self, usage: list[int]) -> list[int]:
        """Return the usage of the whole stream. The engine counts only the tokens of the continuation."""
        return [self._prompt, self._before + usage[1], min(usage[2], self._prompt)]

    def _events(self, event: Event, meta: dict[str, Any]) -> list[Event]:
        event |= self._head
        if "usage" in event and event["usage"] is not None:
            event["usage"] = _openai_usage(meta["usage"])
        if not self._chat:
            return [event]
        counted = ("usage", "timings") if "usage" in event else ()
        last = {key: event.pop(key) for key in counted if key in event}
        event["object"] = "chat.completion.chunk"
        events = []
        for choice in event["choices"]:
            if choice["text"]:
                events.append({**event, "choices": [_chat_choice(choice["text"], None)]})
            if choice["finish_reason"]:
                events.append({**event, "choices": [_chat_choice("", choice["finish_reason"])]})
        if last:
            events.append({**event, "choices": [], **last})
        return events


def _chat_choice(text: str, reason: str | None) -> Event:
    return {"finish_reason": reason, "index": 0, "delta": {"content": text} if text else {}}


def _openai_usage(usage: list[int]) -> dict[str, Any]:
    prompt, answer, cached = usage
    return {
        "completion_tokens": answer,
        "prompt_tokens": prompt,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def is_ids(prompt: Any) -> bool:
    """Return True if a prompt is a list of token ids."""
    return isinstance(prompt, list) and bool(prompt) and all(type(each) is int for each in prompt)
