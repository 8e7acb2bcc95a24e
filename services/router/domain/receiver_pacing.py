"""How many webhooks go to one receiver at once, and when those that may not go now come back. Pure.

A receiver that does not answer rests: nothing is sent to it for a while, then one to see whether it is
back. What is put off gets a slot of its own in time, as fast as the receiver has been answering, so that
thousands for one slow receiver are not looked at again and again.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.router.domain.webhooks import RetryPolicy, WebhookAttempt, pause_s

# A slot is never further away than this: the receiver may be quicker by then.
LONGEST_SLOT_S = 60.0
SHORTEST_SLOT_S = 0.5
SMOOTHING = 0.1
# That a receiver did not answer is remembered for so long after its rest.
REMEMBERED_S = 600.0


@dataclass(slots=True)
class ReceiverPacing:
    """One receiver (a host and port). Times are seconds on one monotonic clock."""

    at_once: int
    longest_queue: int
    in_flight: int = 0
    waiting: int = 0
    failures: int = 0
    rests_until: float = 0.0
    took_s: float = 0.05
    _next_slot: float = 0.0

    def put_off(self, now: float) -> float | None:
        """None: it may wait here for its turn. Else the seconds after which it is to come back."""
        if now >= self.rests_until and self.waiting < (1 if self.failures else self.longest_queue):
            return None
        first = max(self.rests_until, now + SHORTEST_SLOT_S)
        slot = max(first, min(self._next_slot, now + LONGEST_SLOT_S))
        self._next_slot = slot + self.took_s / self.at_once
        return slot - now

    def may_send(self, now: float) -> bool:
        """Whether one more may go now; of one that did not answer last time, one alone."""
        return now >= self.rests_until and self.in_flight < (1 if self.failures else self.at_once)

    def ended(self, sent: WebhookAttempt, now: float, draw: float, policy: RetryPolicy) -> None:
        """One try has ended (the caller lowers ``in_flight``): what it says of the receiver."""
        self.took_s += SMOOTHING * (sent.took_ms / 1e3 - self.took_s)
        if sent.answered:
            self.failures, self.rests_until = 0, 0.0
            return
        self.failures += 1
        self.rests_until = max(self.rests_until, now + pause_s(self.failures, draw, policy))

    def is_idle(self, now: float) -> bool:
        """Whether it may be forgotten: nothing is under way, and its rest, if any, is long over."""
        remembered = self.failures and now < self.rests_until + REMEMBERED_S
        return not (self.in_flight or self.waiting or remembered)
