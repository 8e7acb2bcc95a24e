"""Continue a chat or a completion that another vLLM began. Pure.

The new prompt is the token ids of the old prompt and of the answer so far.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from bridge import error_status, usage_of
from calls import Refused
from vllm_events import CHAT, COMPLETIONS

# A continuation copies these fields from the original request. :func:`request` sets the model, the prompt,
# the token limits and the fields that concern streaming. The remaining fields are not copied. They concern
# only the chat template, or they make a continuation impossible.
_COPIED = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop", "stop_token_ids",
    "ignore_eos", "logit_bias", "skip_special_tokens", "spaces_between_special_tokens",
    "include_stop_str_in_output", "user", "priority",
)  # fmt: skip
# With one of these fields, a continued answer would differ from an answer that was never interrupted.
_REFUSED = (
    "tools", "functions", "response_format", "structured_outputs", "guided_json", "guided_regex",
    "guided_choice", "guided_grammar", "logprobs", "top_logprobs", "prompt_logprobs", "frequency_penalty",
    "presence_penalty", "echo", "use_beam_search", "suffix",
)  # fmt: skip
# The most token ids whose text the engine can hold back. The engine holds a text back while its last
# character is incomplete, or while the text may be the beginning of a stop word.
MAX_HELD_BACK = 32


def refusal(path: str, body: dict[str, Any]) -> str | None:
    """Return why an answer cannot be continued; None if it can."""
    if path not in (CHAT, COMPLETIONS) or not body.get("stream"):
        return "only streams of chats and completions can be continued"
    if (body.get("n") or 1) != 1 or (body.get("best_of") or 1) != 1:
        return "it has several choices"
    if used := [name for name in _REFUSED if body.get(name)]:
        return f"it uses {used[0]}"
    return None


def kept(emitted: list[int], text: str, decode: Callable[[list[int]], str]) -> tuple[int, str]:
    """Return the number of ``emitted`` ids that the new request contains, and the text to skip.

    ``emitted``: the token ids that the lost engine sent. ``text``: the text that the caller already has.

    An engine can send ids before their text. It holds the text back while a character is incomplete, or while
    the text may be a stop word. So the caller may lack the text of the last ids, or a part of it.

    The new request continues the answer in a new engine. It contains only the first ids, those whose whole
    text the caller has. The new engine generates the other ids again, with their whole text. The caller may
    already have the beginning of this text. This beginning is the text to skip.

    Raise Refused if ``text`` does not fit ``emitted``.
    """
    for count in range(len(emitted), max(len(emitted) - MAX_HELD_BACK, -1), -1):
        decoded = decode(emitted[:count]) if count else ""
        if text.startswith(decoded):
            return count, text[len(decoded) :]
    raise Refused(
        500,
        "The stream cannot be continued: its text does not fit its tokens. Send the request again.",
        "server_error",
    )


def request(body: dict[str, Any], ids: list[int], done: int, context: int, model: str) -> dict[str, Any]:
    """Return the body of a completion request that continues an answer after ``ids``.

    ``ids``: the token ids of the prompt, then the token ids of the answer. ``done``: how many of these ids
    belong to the answer. ``context``: the model's context length in tokens. ``model``: the model's name in
    the engine.
    """
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    left = context - len(ids)
    found = {name: body[name] for name in _COPIED if body.get(name) is not None}
    if body.get("min_tokens"):
        found["min_tokens"] = max(body["min_tokens"] - done, 0)
    return {
        **found,
        "model": model,
        "prompt": ids,
        "max_tokens": max(min(limit - done, left) if limit else left, 1),
        "add_special_tokens": False,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "return_token_ids": True,
    }


class ContinuedEvents:
    """Convert the events of a continuation to the format of the stream's first part.

    ``skip``: text that the caller already has, and that the continuation repeats. ``done``: how many token
    ids of the answer were in the prompt of the continuation.
    """

    def __init__(self, path: str, body: dict[str, Any], resume: dict[str, Any], done: int, skip: str) -> None:
        self._chat, self._model = path == CHAT, body.get("model")
        self._keep_usage = bool((body.get("stream_options") or {}).get("continuous_usage_stats"))
        self._id, self._created = resume.get("id"), resume.get("created")
        self._prompt, self._done, self._skip = len(resume["prompt"]), done, skip
        self._known = len(resume["emitted"]) - done

    def read(self, event: bytes) -> tuple[list[bytes], dict[str, Any]]:
        """Convert an event of the continuation to events for the caller. Also return the event's facts.

        The facts are token counts and token ids, or the status of an error.
        """
        document = json.loads(event)
        if (status := error_status(document)) is not None:
            return [event], {"status": status}
        meta: dict[str, Any] = {}
        usage = usage_of(document)
        choices = [self._choice(choice, meta) for choice in document.get("choices") or []]
        if usage:
            meta["usage"] = [self._prompt, self._done + usage[1], usage[2]]
        if choices and self._is_empty(choices[0]):
            return [], meta
        return [self._event(document, choices, meta.get("usage"))], meta

    def whole(self, body: bytes) -> tuple[bytes, dict[str, Any]]:
        """Return a body unchanged, without facts. The answer to a continuation is normally a stream."""
        return body, {}

    def _event(self, document: dict[str, Any], choices: list[Any], usage: list[int] | None) -> bytes:
        found = {
            **document,
            "id": self._id or document.get("id"),
            "created": self._created or document.get("created"),
            "model": self._model,
            "choices": choices,
        }
        if self._chat:
            found["object"] = "chat.completion.chunk"
        found.pop("usage", None)
        if usage and (not choices or self._keep_usage):
            found["usage"] = {
                "prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": usage[0] + usage[1],
            }  # fmt: skip
        return json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode()

    def _choice(self, choice: dict[str, Any], meta: dict[str, Any]) -> dict[str, Any]:
        ids = choice.get("token_ids") or []
        fresh, self._known = ids[self._known :], max(self._known - len(ids), 0)
        if fresh:
            meta["ids"] = fresh
        text = self._without_skipped(choice.get("text") or "")
        ends = {name: choice[name] for name in ("finish_reason", "stop_reason") if name in choice}
        if self._chat:
            return {"index": 0, "delta": {"content": text} if text else {}, "logprobs": None, **ends}
        return {"index": 0, "text": text, "logprobs": None, **ends}

    def _without_skipped(self, text: str) -> str:
        """Return a text without the beginning that the caller already has.

        Raise Refused if the engine wrote something else in place of this beginning.
        """
        common = min(len(text), len(self._skip))
        if text[:common] != self._skip[:common]:
            raise Refused(
                500,
                "The stream cannot be continued: the engine wrote a different text. Send the request again.",
                "server_error",
                "stream_not_continued",
            )  # fmt: skip
        self._skip = self._skip[common:]
        return text[common:]

    def _is_empty(self, choice: dict[str, Any]) -> bool:
        text = choice["delta"].get("content") if self._chat else choice["text"]
        return not text and not choice.get("finish_reason")


def finished(path: str, body: dict[str, Any], resume: dict[str, Any]) -> list[bytes] | None:
    """Return the final events of a stream whose answer is complete; None for an incomplete answer.

    The engine was lost before it sent these events. The answer is complete if it has as many tokens as the
    request's limit allows.
    """
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    if not limit or len(resume["emitted"]) < limit:
        return None
    chat = path == CHAT
    choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": "length"}
    choice |= {"delta": {}} if chat else {"text": ""}
    head = {
        "id": resume.get("id"), "object": "chat.completion.chunk" if chat else "text_completion",
        "created": resume.get("created"), "model": body.get("model"),
    }  # fmt: skip
    prompt, answer = len(resume["prompt"]), len(resume["emitted"])
    usage = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
    both = [{**head, "choices": [choice]}, {**head, "choices": [], "usage": usage}]
    return [json.dumps(each, separators=(",", ":")).encode() for each in both]
