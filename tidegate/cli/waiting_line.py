"""Show on stderr why a request waits, until its first output."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from tidegate.cli.api import Control, Doc
from tidegate.cli.output import console, plain, say
from tidegate.kernel.errors import TidegateError

if TYPE_CHECKING:
    from rich.status import Status

# Seconds of waiting before the line appears. A ready model usually answers sooner.
AFTER_S = 1.5
POLL_S = 1.0


class WaitingLine:
    """A line with the state of a model. It appears if a request waits longer than ``AFTER_S`` seconds.

    ``look`` returns the state in words. On a terminal the line disappears with the first output. Elsewhere
    each new state is a new line.
    """

    def __init__(self, name: str, look: Callable[[], str]) -> None:
        self._name = name
        self._look = look
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._status: Status | None = None

    def __enter__(self) -> WaitingLine:
        self._ended.clear()
        threading.Thread(target=self._show, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Remove the line."""
        with self._lock:
            self._ended.set()
            if self._status is not None:
                self._status.stop()
                self._status = None

    def _show(self) -> None:
        ended, began, last = self._ended, time.monotonic(), ""
        wait_s = AFTER_S
        while not ended.wait(wait_s):
            state, wait_s = self._look(), POLL_S
            with self._lock:
                if ended.is_set():
                    return
                self._tell(state, last, time.monotonic() - began)
                last = state

    def _tell(self, state: str, last: str, elapsed_s: float) -> None:
        text = f"Waiting for {self._name}, {elapsed_s:.0f} s: {plain(state)}"
        if not console(stderr=True).is_terminal:
            if state != last:
                say(text)
        elif self._status is None:
            self._status = console(stderr=True).status(text)
            self._status.start()
        else:
            self._status.update(text)


def state_of(control: Control, name: str) -> str:
    """Return why a request to an endpoint waits, in words; "no token yet" if the state cannot be read."""
    from tidegate.cli.publish import status_of

    try:
        status = status_of(control, control.deployment_of(name))
    except TidegateError:
        return "no token yet"
    return in_words(status)


def in_words(status: Doc | None) -> str:
    """Return the reason for a wait, from the autoscaler's status of a Deployment."""
    if status is None:
        return "the autoscaler has not seen the deployment yet"
    if status["ready"]:
        return "it is ready; the request waits for its turn or for the first token"
    conditions = {condition["type"]: condition for condition in status["conditions"]}
    for kind in ("Loaded", "Ready"):
        found = conditions.get(kind)
        if found is not None and not found["ok"] and found.get("message"):
            return f"it is starting: {found['message']}"
    return "it is starting"
