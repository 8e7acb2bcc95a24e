"""Run llama.cpp in this process, with the package ``xllamacpp``.

A chat or completion uses the engine's Python functions if it is a stream, or if its answer is plain text. All
other requests go through the engine's own HTTP server on the loopback interface. That server accepts only
requests with a secret key, and only this process knows the key.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import relay
from calls import Call, Refused
from llamacpp_events import StreamEvents, with_counts
from llamacpp_resume import ResumedEvents, can_continue, continuation
from llamacpp_settings import PATHS, settings
from llamacpp_whole import WholeAnswer, can_join

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def create(plan: dict[str, Any], folder: Path) -> LlamaCpp:
    """Load the model and return its engine. Raise an exception, with the reason, if the model cannot run."""
    return LlamaCpp(plan, folder)


class LlamaCpp:
    """A model in llama.cpp's server inside this process.

    ``plan``: see ``services/worker/domain/llm_plan.py``.
    """

    def __init__(self, plan: dict[str, Any], folder: Path) -> None:
        import xllamacpp

        self._plan = plan
        params, key = settings(xllamacpp, plan, folder)
        self._adapters = list(plan["adapters"])
        self._headers = {"Authorization": f"Bearer {key}"}
        self._server = xllamacpp.Server(params)
        print(
            f"llama.cpp (xllamacpp {xllamacpp.__version__}) has {plan['slots']} slots of up to "
            f"{plan['context']} tokens, and a KV cache of {plan['kv_total']} tokens"
        )
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
        body = self._with_adapter(body)
        if resume is not None:
            self._continue(body, resume, call)
        elif path in self._direct and body.get("stream"):
            self._begin(path, body, call)
        elif path in self._direct and can_join(body):
            self._join(path, body, call)
        else:
            relay.relay(self._server.listening_address, path, body, self._headers, call)

    def _with_adapter(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the body of the request for the engine.

        If ``model`` in the request names a LoRA adapter, the returned body selects this adapter.
        """
        model, colon, adapter = str(body.get("model") or "").rpartition(":")
        if not self._adapters:
            return body
        # Without this option, llama.cpp would reuse the KV cache of an equal prompt, even if that prompt ran
        # with another adapter. Then the answer would be wrong.
        body = {**body, "cache_prompt": False}
        if not colon:
            return body
        if adapter not in self._adapters:
            known = ", ".join(f"{model}:{each}" for each in self._adapters)
            raise Refused(
                404, f"The model has no adapter {adapter!r}. It has {known}.", code="model_not_found"
            )
        return {**body, "lora": [{"id": self._adapters.index(adapter), "scale": 1.0}]}

    def _join(self, path: str, body: dict[str, Any], call: Call) -> None:
        whole = WholeAnswer()

        def on_event(text: str) -> bool:
            """Add an event. Return True if the engine must stop."""
            whole.add(text)
            return call.cancelled

        self._run(path, with_counts({**body, "stream": True}), on_event)
        if not call.cancelled:
            call.emit(*whole.emission())

    def _begin(self, path: str, body: dict[str, Any], call: Call) -> None:
        if not can_continue(body):
            self._stream(path, with_counts(body), StreamEvents(body), call)
            return
        # Get the prompt's token ids in a separate thread. So the engine does not wait for them before it
        # reads the prompt.
        threading.Thread(target=self._emit_prompt_ids, args=(body, call), daemon=True).start()
        self._stream(path, with_counts(body, ids=True), StreamEvents(body, self._tokenize), call)

    def _continue(self, body: dict[str, Any], resume: dict[str, Any], call: Call) -> None:
        if not can_continue(body):
            raise Refused(400, "A stream with tools, logprobs, n or a grammar cannot be continued.")
        events = ResumedEvents(body, resume, self._tokenize, self._plan["name"])
        rest = continuation(body, resume)
        if rest.get("max_tokens") == 0:
            call.emit(*events.finished())
            return
        self._stream(COMPLETIONS, with_counts(rest, ids=True), events, call)

    def _stream(
        self, path: str, body: dict[str, Any], events: StreamEvents | ResumedEvents, call: Call
    ) -> None:
        def on_event(text: str) -> bool:
            """Emit an event. Return True if the engine must stop."""
            kept, meta = events.read(text)
            if kept or meta:
                call.emit(kept, meta)
            return call.cancelled

        self._run(path, body, on_event)

    def _run(self, path: str, body: dict[str, Any], on_event: Callable[[str], bool]) -> None:
        try:
            self._direct[path](json.dumps(body), on_event)
        except ValueError as problem:  # the engine's message about a bad body
            raise Refused(400, str(problem)) from None

    def _emit_prompt_ids(self, body: dict[str, Any], call: Call) -> None:
        """Emit the ids of the prompt's tokens. With them, another replica can continue a lost stream."""
        prompt = body.get("prompt")
        try:
            if "messages" in body:
                prompt = self._ask("/apply-template", {**body, "stream": False})["prompt"]
            if isinstance(prompt, str):
                asked = {"content": prompt, "add_special": True, "parse_special": True}
                prompt = self._ask("/tokenize", asked)["tokens"]
        except relay.NoAnswer:
            return  # the engine itself refuses the request and states the reason
        call.emit([], {"prompt_ids": prompt})

    def _tokenize(self, text: str) -> list[int]:
        try:
            tokens: list[int] = self._ask("/tokenize", {"content": text, "add_special": False})["tokens"]
        except relay.NoAnswer:
            return []
        return tokens

    def _ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return relay.ask(self._server.listening_address, path, body, self._headers)

    def stats(self) -> dict[str, Any]:
        """Return the number of engine slots. ``Tally`` counts all other figures."""
        return {"slots": self._plan["slots"]}

    def close(self) -> None:
        """End the engine."""
        del self._direct, self._server
