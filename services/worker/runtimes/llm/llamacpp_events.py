"""Add token counts to llama.cpp's requests, and remove them from its events. Pure."""

from __future__ import annotations

import json
from typing import Any


def with_counts(body: dict[str, Any]) -> dict[str, Any]:
    """Return the body of a stream with the options that make llama.cpp report its token counts.

    ``return_progress`` also makes it report the progress of a long prompt, so it can be cancelled meanwhile.
    """
    options = {**(body.get("stream_options") or {}), "include_usage": True}
    return {**body, "stream_options": options, "timings_per_token": True, "return_progress": True}


class StreamEvents:
    """The events of one stream, without what :func:`with_counts` added and the caller did not ask for."""

    def __init__(self, body: dict[str, Any]) -> None:
        self._keep_timings = bool(body.get("timings_per_token"))
        self._keep_progress = bool(body.get("return_progress"))

    def read(self, text: str) -> tuple[list[bytes], dict[str, Any]]:
        """Return an event for the caller, if it is for the caller, and the facts in it."""
        event = json.loads(text)
        if "error" in event:
            return [text.encode()], {"status": int(event["error"].get("code") or 500)}
        meta: dict[str, Any] = {}
        timings, usage = event.get("timings"), event.get("usage")
        if usage:
            meta["usage"] = usage_of(event)
        elif timings:
            cached = timings["cache_n"]
            meta["usage"] = [cached + timings["prompt_n"], timings["predicted_n"], cached]
        if "prompt_progress" in event and not self._keep_progress:
            return [], meta
        if timings and not usage and not self._keep_timings:
            del event["timings"]
            return [json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode()], meta
        return [text.encode()], meta


def usage_of(document: dict[str, Any]) -> list[int] | None:
    """Return prompt tokens, answer tokens and cached prompt tokens of an answer; None: it has none.

    Reads both of OpenAI's shapes: that of chats and completions, and that of responses.
    """
    usage = document.get("usage") or (document.get("response") or {}).get("usage")
    if not usage:
        return None
    prompt = usage.get("prompt_tokens", usage.get("input_tokens", 0))
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    answer = usage.get("completion_tokens", usage.get("output_tokens", 0))
    return [prompt, answer, details.get("cached_tokens") or 0]
