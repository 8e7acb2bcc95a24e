"""The calls of an engine. A call collects events, and tells the engine of a cancellation.

This file and ``model.py`` are copied into one folder, and run in Triton's Python. There, Tidegate is not
installed, and numpy is the only package that is always present.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from typing import Any, Protocol


class Refused(Exception):
    """The engine's refusal of a request. ``status`` is its HTTP status in OpenAI's API."""

    def __init__(
        self, status: int, message: str, kind: str = "invalid_request_error", code: str = ""
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.code = status, kind, code
        self.retry_after_s: float | None = None

    def body(self) -> bytes:
        """Return the error body in OpenAI's shape."""
        error = {"message": str(self), "type": self.kind, "param": None, "code": self.code or None}
        return json.dumps({"error": error}).encode()

    def meta(self) -> dict[str, Any]:
        """Return the facts about the refusal: its status, and the seconds before a retry if known."""
        wait = {} if self.retry_after_s is None else {"retry_after_s": self.retry_after_s}
        return {"status": self.status, **wait}


class Call:
    """One request in an engine. The engine emits events from its thread; another thread takes and sends them.

    Events that are ready at the same time are taken together.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._events: list[bytes] = []
        self._meta: dict[str, Any] = {}
        self._ended = self._cancelled = False
        self._on_cancel: list[Callable[[], None]] = []
        # The numbers of prompt tokens, answer tokens and cached prompt tokens so far.
        self.usage = [0, 0, 0]

    def emit(self, events: list[bytes], meta: dict[str, Any]) -> None:
        """Add events of the answer, and facts about them.

        ``meta``: the facts, as fields of ``tidegate.kernel.protocol.llm.Meta``.
        """
        with self._changed:
            self._events += events
            for key in ("prompt_ids", "ids"):
                if meta.get(key):
                    self._meta.setdefault(key, []).extend(meta[key])
            self._meta.update({k: v for k, v in meta.items() if k not in ("prompt_ids", "ids")})
            if meta.get("usage"):
                self.usage = list(meta["usage"])
            self._changed.notify()

    @property
    def cancelled(self) -> bool:
        """Return True if the call was cancelled, because the caller no longer waits."""
        return self._cancelled

    def on_cancel(self, action: Callable[[], None]) -> None:
        """Run ``action`` when the call is cancelled. The thread that calls :meth:`cancel` runs it.

        If the call is already cancelled, run ``action`` now, in this thread.
        """
        with self._changed:
            if not self._cancelled:
                self._on_cancel.append(action)
                return
        action()

    def cancel(self) -> None:
        """Cancel the call in the engine, because the caller no longer waits."""
        with self._changed:
            if self._cancelled:
                return
            self._cancelled = True
            actions = list(self._on_cancel)
            self._changed.notify()
        for action in actions:
            with contextlib.suppress(Exception):
                action()

    def end(self) -> None:
        """Mark that the engine emits no more events."""
        with self._changed:
            self._ended = True
            self._changed.notify()

    def take(self, timeout_s: float) -> tuple[list[bytes], dict[str, Any], bool]:
        """Return the events since the last :meth:`take`, their facts, and True if no more events follow.

        Wait up to ``timeout_s`` seconds for an event or the end of the call.
        """
        with self._changed:
            if not self._events and not self._ended:
                self._changed.wait(timeout_s)
            if not self._events and not self._ended:
                return [], {}, False
            events, meta = self._events, self._meta
            self._events, self._meta = [], {}
            return events, meta, self._ended


class Engine(Protocol):
    """The interface of all engines: llama.cpp in this process, or a bridge to another server."""

    def call(self, path: str, body: dict[str, Any], resume: dict[str, Any] | None, call: Call) -> None:
        """Run a request in the calling thread, and emit its events until the last one.

        Raise :class:`Refused` if the request cannot run.
        """

    def stats(self) -> dict[str, Any]:
        """Return the engine's own figures.

        They are fields of ``tidegate.kernel.protocol.presence.EngineReport``.
        """

    def close(self) -> None:
        """End the engine."""
