"""Send the messages about alerts and changes in the registry; retry after an error. Only the leader sends."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from services.router.adapters.alert_file import AlertFile, AlertMessage, MessageState
from services.router.adapters.mail_sender import MailSender
from services.router.adapters.webhook_sender import WebhookSender
from services.router.domain import webhooks
from services.router.domain.alerts.notifications import Receiver
from services.router.domain.webhooks import RetryPolicy, WebhookAttempt
from tidegate.kernel import telemetry
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol.webhooks import read_url
from tidegate.kernel.repeating_task import RepeatingTask

log = telemetry.logger(__name__)

POLL_S = 1.0
AT_ONCE = 8
# The secret that signs webhooks about alerts is derived from this name.
PRINCIPAL = "alerts"


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
        await self._http.close()

    async def _step(self) -> float:
        if self._leads():
            receivers = {each.name: each for each in self._file.receivers()}
            messages = self._file.due(time.time(), AT_ONCE)
            await asyncio.gather(*(self._deliver(each, receivers) for each in messages))
            if len(messages) == AT_ONCE:
                return 0.0
        return POLL_S

    async def _deliver(self, message: AlertMessage, receivers: Mapping[str, Receiver]) -> None:
        receiver = receivers.get(message.receiver)
        if receiver is None:
            self._file.settle(message.id, "given_up", message.attempt, 0.0, "the receiver was removed")
            return
        result = await self.send(message, receiver)
        attempt, now = message.attempt + 1, time.time()
        decision = webhooks.decide(result, attempt, now - message.made_at, random.random(), self._policy)
        state: MessageState = "waiting" if decision.outcome == "retry" else decision.outcome
        try:
            self._file.settle(message.id, state, attempt, now + decision.delay_s, described(result))
        except Unavailable as error:  # the message is sent again, with the same id
            log.warning("the result of a message could not be stored", extra={"problem": error.message})
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
