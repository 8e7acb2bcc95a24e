"""The state of a worker, as its health check and its heartbeats report it."""

from __future__ import annotations

import time

from tidegate.kernel.protocol.presence import ReplicaState


class ReplicaStatus:
    """State and message of a worker.

    ``failed`` is True if the worker could not serve. Then its process exits with an error. While a replica
    drains, its state stays ``draining``, unless it fails.
    """

    def __init__(self, message: str) -> None:
        self.state: ReplicaState = "starting"
        self.message = message
        self.draining = False
        self.failed = False
        self.started_at = time.time()
        self.ready_at = 0.0

    @property
    def problem(self) -> str:
        """Return the state and the message as one text, for a health check."""
        return f"{self.state}: {self.message}"

    def step(self, message: str) -> None:
        """Set the message, and keep the state."""
        self.message = message

    def set(self, state: ReplicaState, message: str = "") -> None:
        """Set the state and the message."""
        self.state, self.message = "draining" if self.draining else state, message
        if state == "ready":
            self.ready_at = self.ready_at or time.time()

    def fail(self, message: str) -> None:
        """Set the state to ``failed``, for this reason."""
        self.state, self.message, self.failed = "failed", message, True
