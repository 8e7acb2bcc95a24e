"""Make llama.cpp report token counts and ids, and remove them from the events for the caller. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

Event = dict[str, Any]
Tokenize = Callable[[str], list[int]]


def with_counts(body: dict[str, Any], *, ids: bool = False) -> dict[str, Any]:
    """Return a request's body with the options that make llama.cpp report token counts.

    ``return_progress`` makes llama.cpp send events during a long prompt. So the request can be cancelled
    before its first token. ``ids``: True if llama.cpp must also report the ids of tokens. It reports ids only
    with log probabilities, so these are requested too.
    """
    options = {**(body.get("stream_options") or {}), "include_usage": True}
    asked = {**body, "stream_options": options, "timings_per_token": True, "return_progress": True}
    if ids:
        asked |= {"logprobs": True, "top_logprobs": 1} if "messages" in body else {"logprobs": 1}
    return asked


class StreamEvents:
    """Convert the events of one stream for the caller: remove what only :func:`with_counts` requested.

    ``tokenize``: a function that returns the token ids of a text. If it is None, no ids are reported.
    """

    def __init__(self, body: dict[str, Any], tokenize: Tokenize | None = None) -> None:
        self._keep_timings = bool(body.get("timings_per_token"))
        self._keep_progress = bool(body.get("return_progress"))
        self._tokenize = tokenize
        self._strip_ids = tokenize is not None
        self._has_stops = bool(body.get("stop"))
        self._texts: dict[int, str] = {}
        self._count = 0

    def read(self, text: str) -> tuple[list[bytes], dict[str, Any]]:
        """Return the event for the caller, or no event if only Tidegate needs it. Also return its facts."""
        event = json.loads(text)
        if "error" in event:
            return [text.encode()], {"status": int(event["error"].get("code") or 500)}
        meta, changed = self._facts(event)
        if "prompt_progress" in event and not self._keep_progress:
            return [], meta
        return [encoded(event) if changed else text.encode()], meta

    def take(self, event: Event) -> tuple[Event | None, dict[str, Any]]:
        """Return the event for the caller, or None if only Tidegate needs it. Also return its facts.

        ``event``: the engine's event, already decoded and without an error.
        """
        meta, _ = self._facts(event)
        return (None if "prompt_progress" in event and not self._keep_progress else event), meta

    def _facts(self, event: Event) -> tuple[dict[str, Any], bool]:
        """Remove fields that only Tidegate requested. Return the event's facts, and True if it changed."""
        meta: dict[str, Any] = {}
        timings, usage, changed = event.get("timings"), event.get("usage"), False
        if usage:
            meta["usage"] = usage_of(event)
        elif timings:
            cached = timings["cache_n"]
            meta["usage"] = [cached + timings["prompt_n"], timings["predicted_n"], cached]
        if self._strip_ids:
            changed = self._take_ids(event, meta)
        if timings and not usage and not self._keep_timings:
            del event["timings"]
            changed = True
        return meta, changed

    def _take_ids(self, event: Event, meta: dict[str, Any]) -> bool:
        """Move the token ids from an event to ``meta``. Return True if the event was changed."""
        changed = False
        for choice in event.get("choices", ()):
            if not choice.get("logprobs"):
                continue
            (entry,) = choice["logprobs"]["content"]
            _remove_logprobs(choice)
            changed = True
            if self._tokenize is not None and "usage" in meta and entry["bytes"]:
                self._add_ids(choice, entry, meta)
        return changed

    def _add_ids(self, choice: Event, entry: Event, meta: dict[str, Any]) -> None:
        """Add the ids of an event's tokens to ``meta``. After an event with unknown ids, add no more ids.

        The engine reports only the id of an event's last token. An event has several tokens in two cases:
        together they make one character, or the engine waited because they could be the start of a stop text.
        Before a stop text, an event may contain only a part of its last token.
        """
        wanted, text = meta["usage"][1] - self._count, bytes(entry["bytes"]).decode(errors="replace")
        ids = [entry["id"]]
        if wanted > 1 or (self._has_stops and self._texts.get(entry["id"]) != text):
            ids = self._ids_of(text, wanted)
        plain = set(choice.get("delta", {"content": ""})) <= {"content", "role"}
        if len(ids) != wanted or ids[-1] != entry["id"] or not plain:
            self._tokenize = None
            return
        if wanted == 1:
            self._texts[entry["id"]] = text
        self._count += wanted
        meta["ids"] = ids

    def _ids_of(self, text: str, wanted: int) -> list[int]:
        """Return the token ids of ``text``. ``wanted``: the number of tokens that the engine counted.

        The tokenizer may put a space before the text. Then there is one token more than ``wanted``, and the
        first token is left out.
        """
        assert self._tokenize is not None
        ids = self._tokenize(text)
        return ids[1:] if len(ids) == wanted + 1 else ids


def _remove_logprobs(choice: Event) -> None:
    """Remove the log probabilities from a choice, because the caller did not request them."""
    if "delta" in choice:
        del choice["logprobs"]
    else:
        choice["logprobs"] = None


def encoded(event: Event) -> bytes:
    """Return an event as JSON."""
    return json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode()


def usage_of(document: dict[str, Any]) -> list[int] | None:
    """Return the numbers of prompt, answer and cached prompt tokens; None if there is no ``usage``.

    Reads two formats of ``usage``: that of chats and completions, and that of the Responses API.
    """
    usage = document.get("usage") or (document.get("response") or {}).get("usage")
    if not usage:
        return None
    prompt = usage.get("prompt_tokens", usage.get("input_tokens", 0))
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    answer = usage.get("completion_tokens", usage.get("output_tokens", 0))
    return [prompt, answer, details.get("cached_tokens") or 0]
