"""Run llama.cpp in this process, with the package ``xllamacpp``.

Streams of chats and completions call the engine directly. All other requests go through the engine's own HTTP
server on the loopback interface, which only this process can use: it has a key of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import relay
from calls import Call, Refused
from llamacpp_events import StreamEvents, with_counts
from llamacpp_settings import PATHS, settings

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def create(plan: dict[str, Any], folder: Path) -> LlamaCpp:
    """Load the model and return its engine. Raise an exception, with the reason, if it cannot run."""
    return LlamaCpp(plan, folder)


class LlamaCpp:
    """llama.cpp's server. ``plan``: see ``services/worker/adapters/llm_repository.py``."""

    def __init__(self, plan: dict[str, Any], folder: Path) -> None:
        import xllamacpp

        self._plan = plan
        params, self._key = settings(xllamacpp, plan, folder)
        self._server = xllamacpp.Server(params)
        self._direct = {
            CHAT: self._server.handle_chat_completions,
            COMPLETIONS: self._server.handle_completions,
        }

    def call(self, path: str, body: dict[str, Any], resume: dict[str, Any] | None, call: Call) -> None:
        """Run a request, and emit its events until the last one."""
        if path not in PATHS:
            raise Refused(
                404,
                f"The engine llamacpp has no path {path}. It has {', '.join(PATHS)}.",
                code="unknown_path",
            )
        if path in self._direct and body.get("stream"):
            self._stream(path, body, call)
            return
        headers = {"Authorization": f"Bearer {self._key}"}
        relay.relay(self._server.listening_address, path, body, headers, call)

    def _stream(self, path: str, body: dict[str, Any], call: Call) -> None:
        events = StreamEvents(body)

        def on_event(text: str) -> bool:
            """Emit an event. Return True if the engine shall stop."""
            kept, meta = events.read(text)
            if kept or meta:
                call.emit(kept, meta)
            return call.cancelled

        try:
            self._direct[path](json.dumps(with_counts(body)), on_event)
        except ValueError as problem:  # the engine's message about a bad body
            raise Refused(400, str(problem)) from None

    def stats(self) -> dict[str, Any]:
        """Return what is known of slots, running, waiting, kv_used, kv_total and totals of tokens."""
        return {"slots": self._plan["slots"]}

    def close(self) -> None:
        """End the engine."""
        del self._direct, self._server
