"""Limit the number of webhooks in flight to each receiver, and decide when postponed ones are sent. Pure.

A receiver that does not answer is paused. After the pause, a single webhook tests if the receiver answers
again. Each postponed webhook gets a send time. The send times follow each other at the rate at which the
receiver has answered. Without send times, the router would load thousands of waiting webhooks from the store
again and again.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.router.domain.webhooks import RetryPolicy, WebhookAttempt, pause_s

# The longest delay until a webhook's send time, in seconds. A longer delay would be wrong if the receiver
# becomes faster.
LONGEST_SLOT_S = 60.0
SHORTEST_SLOT_S = 0.5
SMOOTHING = 0.1
# A receiver's failures are forgotten this many seconds after its pause has ended.
REMEMBERED_S = 600.0


@dataclass(slots=True)
class ReceiverPacing:
    """The load and the failures of one receiver (host and port). Times are seconds on a monotonic clock.

    ``mean_s``: the mean duration of an attempt. ``_next_slot``: the send time of the next postponed webhook.
    """

    max_in_flight: int
    longest_queue: int
    in_flight: int = 0
    waiting: int = 0
    failures: int = 0
    paused_until: float = 0.0
    mean_s: float = 0.05
    _next_slot: float = 0.0

    def postpone(self, now: float) -> float | None:
        """Return the delay of a webhook in seconds; None if the webhook may enter this router's queue."""
        if now >= self.paused_until and self.waiting < (1 if self.failures else self.longest_queue):
            return None
        first = max(self.paused_until, now + SHORTEST_SLOT_S)
        slot = max(first, min(self._next_slot, now + LONGEST_SLOT_S))
        self._next_slot = slot + self.mean_s / self.max_in_flight
        return slot - now

    def may_send(self, now: float) -> bool:
        """Return True if one more attempt may start.

        After a failure, only one attempt may be in flight at a time, until the receiver answers.
        """
        return now >= self.paused_until and self.in_flight < (1 if self.failures else self.max_in_flight)

    def record(self, attempt: WebhookAttempt, now: float, draw: float, policy: RetryPolicy) -> None:
        """Update the mean duration and the pause after an attempt.

        The calling code must update ``in_flight``.
        """
        self.mean_s += SMOOTHING * (attempt.took_ms / 1e3 - self.mean_s)
        if attempt.answered:
            self.failures, self.paused_until = 0, 0.0
            return
        self.failures += 1
        self.paused_until = max(self.paused_until, now + pause_s(self.failures, draw, policy))

    def is_idle(self, now: float) -> bool:
        """Return True if no webhook is in flight or waiting, and all failures can be forgotten."""
        remembered = self.failures and now < self.paused_until + REMEMBERED_S
        return not (self.in_flight or self.waiting or remembered)
