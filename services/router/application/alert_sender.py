"""Send the messages about alerts and changes in the registry; retry after an error. Only the leader sends."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from services.router.adapters.alert_file import AlertFile, AlertMessage, MessageState
from services.router.adapters.mail_sender import MailSender
from services.router.adapters.webhook_sender import WebhookSender
from services.router.domain import webhooks
from services.router.domain.alerts.notifications import Receiver
from services.router.domain.webhooks import RetryPolicy, WebhookAttempt
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol.webhooks import read_url
from tidegate.kernel.repeating_task import RepeatingTask

log = telemetry.logger(__name__)

POLL_S = 1.0
# At most this many messages are in flight to one receiver. So no receiver delays the messages to others.
PER_RECEIVER = 2
# After a failed attempt, a receiver gets no other message until the retry, but at most for this many seconds.
LONGEST_PAUSE_S = 30.0
# The secret that signs webhooks about alerts is derived from this name.
PRINCIPAL = "alerts"


@dataclass(slots=True)
class ReceiverState:
    """The attempts in flight to one receiver, and the Unix time before which no other begins."""

    in_flight: int = 0
    paused_until: float = 0.0


class AlertSender:
    """One of the router's loops. It sends the messages to receivers."""

    def __init__(
        self,
        file: AlertFile,
        http: WebhookSender,
        mail: MailSender,
        master: bytes,
        policy: RetryPolicy,
        leads: Callable[[], bool],
    ) -> None:
        self._file = file
        self._http = http
        self._mail = mail
        self._secret = webhooks.secret_of(master, PRINCIPAL)
        self._policy = policy
        self._leads = leads
        self._in_flight: dict[str, asyncio.Task[None]] = {}  # by the message's id
        self._receivers: dict[str, ReceiverState] = {}  # by name
        self._loop = RepeatingTask("alert messages", self._step, retry_s=POLL_S)

    def start(self) -> None:
        """Start the loop."""
        self._loop.start()

    def wake(self) -> None:
        """Send new messages now."""
        self._loop.wake()

    async def stop(self) -> None:
        """Stop the loop, and close the connections."""
        await self._loop.stop()
        await tasks.end(*self._in_flight.values())
        await self._http.close()

    async def _step(self) -> float:
        if self._leads():
            receivers = {each.name: each for each in self._file.receivers()}
            self._receivers = {name: self._receivers.get(name, ReceiverState()) for name in receivers}
            for name, receiver in receivers.items():
                self._send_due(receiver, self._receivers[name])
            for message in self._file.without_receiver(PER_RECEIVER):
                self._file.settle(message.id, "given_up", message.attempt, 0.0, "the receiver was removed")
        return POLL_S

    def _send_due(self, receiver: Receiver, state: ReceiverState) -> None:
        """Start as many attempts for one receiver as it may have now."""
        now = time.time()
        if state.in_flight >= PER_RECEIVER or now < state.paused_until:
            return
        # The messages in flight are still due in the file.
        for message in self._file.due(receiver.name, now, 2 * PER_RECEIVER):
            if message.id in self._in_flight or state.in_flight >= PER_RECEIVER:
                continue
            state.in_flight += 1
            task = asyncio.create_task(self._deliver(message, receiver, state))
            self._in_flight[message.id] = task
            task.add_done_callback(partial(self._on_done, message.id, state))

    def _on_done(self, id_: str, state: ReceiverState, task: asyncio.Task[None]) -> None:
        state.in_flight -= 1
        del self._in_flight[id_]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a message could not be sent; trying again", exc_info=error)
            state.paused_until = time.time() + POLL_S
        self._loop.wake()

    async def _deliver(
        self, message: AlertMessage, receiver: Receiver, receiver_state: ReceiverState
    ) -> None:
        result = await self.send(message, receiver)
        attempt, now = message.attempt + 1, time.time()
        decision = webhooks.decide(result, attempt, now - message.made_at, random.random(), self._policy)
        state: MessageState = "waiting" if decision.outcome == "retry" else decision.outcome
        try:
            self._file.settle(message.id, state, attempt, now + decision.delay_s, described(result))
        except Unavailable as error:  # the message is sent again, with the same id
            log.warning("the result of a message could not be stored", extra={"problem": error.message})
            receiver_state.paused_until = now + LONGEST_PAUSE_S
        if state == "waiting":
            receiver_state.paused_until = now + min(decision.delay_s, LONGEST_PAUSE_S)
        if state != "delivered":
            log.warning(
                "a message to a receiver was not delivered",
                extra={"receiver": receiver.name, "problem": described(result), "state": state},
            )

    async def send(self, message: AlertMessage, receiver: Receiver) -> WebhookAttempt:
        """Send a message once. Return errors in the result instead of raising them."""
        if receiver.kind == "email":
            return await self._mail.send(message.body)
        target = read_url(receiver.to)
        if target is None:
            return WebhookAttempt(None, "the receiver's address is not the URL of a webhook", 0.0)
        headers: dict[str, str] = {}
        if receiver.kind == "webhook":
            headers = webhooks.signed_headers(self._secret, message.id, int(time.time()), message.body)
        result = await self._http.post(target, message.body, headers)
        # After a 410, a message is normally given up. From Slack, a 410 may be an error of a proxy, so retry
        # it like a 500.
        return replace(result, status=500) if receiver.kind == "slack" and result.status == 410 else result


def described(result: WebhookAttempt) -> str:
    """Return an attempt's result in words."""
    took = f"in {result.took_ms:.0f} ms"
    if result.status is None:
        return result.problem
    return f"{result.status} {result.problem or ''}".strip() + f" {took}"
