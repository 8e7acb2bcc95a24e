"""Evaluate the alert rules after each reading of the traffic, and store messages about changed alerts.

Only the leader evaluates. A file in the state folder holds states, silences and messages, so the next leader
continues with them.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from services.router.adapters.alert_file import AlertFile, AlertMessage
from services.router.adapters.endpoint_metrics import EndpointMetrics
from services.router.application.endpoint_watch import EndpointWatch
from services.router.domain.alerts import formats
from services.router.domain.alerts.alert_rules import RULES, Breach, Rule, breaches
from services.router.domain.alerts.facts import QUARTER, Baseline, Facts, Finding, totals, usual
from services.router.domain.alerts.notifications import Notification, Pace, Receiver, due, for_receiver
from services.router.domain.alerts.silences import Silence
from services.router.domain.alerts.states import Alert, Key, changes, end_removed, step
from tidegate.kernel import telemetry
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol.models import Endpoint
from tidegate.kernel.protocol.service_level import AlertLimits

log = telemetry.logger(__name__)

# A function that returns the current findings of another part, such as drift. It must be quick, because it
# runs in the event loop.
Findings = Callable[[], Iterable[Finding]]
BASELINE_S = 60.0


class AlertRunner:
    """The alerts of all endpoints. They are evaluated after each reading of the traffic."""

    def __init__(
        self,
        watch: EndpointWatch,
        file: AlertFile,
        metrics: EndpointMetrics,
        pace: Pace,
        sender: str,
        *,
        rules: Sequence[Rule] = RULES,
    ) -> None:
        """``sender``: the From address of e-mails."""
        self._watch = watch
        self.file = file
        self._metrics = metrics
        self._pace = pace
        self._sender = sender
        self._rules = tuple(rules)
        self._loaded = False
        self._baselines: dict[str, tuple[float, Baseline | None]] = {}
        self.alerts: dict[Key, Alert] = {}
        self.findings: list[Findings] = []
        # A function that is called when there are new messages.
        self.on_messages: Callable[[], None] = lambda: None

    def forget(self) -> None:
        """Forget the alerts in memory, because this router no longer leads. The file keeps them."""
        self._loaded = False
        self.alerts = {}
        self._metrics.clear()

    async def evaluate(self, now: float) -> None:
        """Evaluate all rules, and store the changes."""
        if not self._loaded:
            self._load(await asyncio.to_thread(self.file.alerts), now)
        facts = self._facts(now)
        held: dict[Key, Breach] = {}
        for each in facts:
            held |= breaches(each, self._rules)
            self._metrics.show(each)
        before = self.alerts
        known = {each.endpoint for each in facts}
        after = step(before, held, now, _new_id, {rule.name: rule for rule in self._rules})
        after = end_removed(after, known, now)
        silences = self.file.silences(now)
        notifications, after = due(after, silences, now, self._pace)
        events = changes(before, after)
        if after != before or notifications:
            messages = self._messages(notifications, now)
            try:
                await asyncio.to_thread(self.file.commit, after.values(), events, messages, now)
            except Unavailable as error:  # nothing was stored, so the next evaluation decides the same again
                log.warning("alerts could not be stored", extra={"problem": error.message})
                return
            if messages:
                self.on_messages()
        for alert in events:
            log.info("alert", extra={"endpoint": alert.endpoint, "rule": alert.rule, "state": alert.state})
        self.alerts = after
        self._metrics.states(after.values())

    def _load(self, stored: Iterable[Alert], now: float) -> None:
        # While no router ran, nobody checked the conditions. So treat the condition of each firing alert as
        # if it held now. Otherwise the alert would be resolved only because no router ran.
        self.alerts = {each.key: _seen(each, now) for each in stored}
        self._loaded = True

    def _facts(self, now: float) -> list[Facts]:
        found: dict[str, list[Finding]] = {}
        for provider in self.findings:
            for each in provider():
                found.setdefault(each.endpoint, []).append(each)
        endpoints = self._watch.endpoints()
        self._metrics.keep({each.name for each in endpoints})
        return [self._facts_of(each, found.get(each.name, []), now) for each in endpoints]

    def _facts_of(self, endpoint: Endpoint, findings: Sequence[Finding], now: float) -> Facts:
        history = self._watch.history.of(endpoint.name)
        last = history.ticks[-1] if history.ticks else None
        if last is not None:
            self._metrics.count(endpoint.name, last)
        return Facts(
            endpoint.name,
            history.recent(300.0, now),
            history.recent(QUARTER, now),
            self._baseline(endpoint.name, now),
            totals(history, now) if endpoint.slo is not None else {},
            last.queue_age_s if last is not None else 0.0,
            endpoint.slo,
            endpoint.alerts or AlertLimits(),
            findings,
        )

    def _baseline(self, name: str, now: float) -> Baseline | None:
        at, found = self._baselines.get(name, (0.0, None))
        if now - at >= BASELINE_S:
            found = usual(self._watch.history.of(name), now)
            self._baselines[name] = (now, found)
        return found

    def _messages(self, notifications: Sequence[Notification], now: float) -> list[AlertMessage]:
        receivers = self.file.receivers() if notifications else []
        return [
            message_of(part, receiver, self._sender, now)
            for notification in notifications
            for receiver in receivers
            if (part := for_receiver(notification, receiver)) is not None
        ]

    def silenced(self, now: float) -> Mapping[Key, Silence]:
        """Return the silence of each alert that is silenced now."""
        silences = self.file.silences(now)
        found = {}
        for key, alert in self.alerts.items():
            for each in silences:
                if each.active(now) and each.matches(alert):
                    found[key] = each
        return found


def message_of(notification: Notification, receiver: Receiver, sender: str, now: float) -> AlertMessage:
    """Format a notification as a message for one receiver."""
    id_ = f"msg_{_new_id()}"
    if receiver.kind == "webhook":
        body = formats.webhook_body(notification, now)
    elif receiver.kind == "slack":
        body = formats.slack_body(notification)
    else:
        body = bytes(formats.email_of(notification, id_, sender, receiver.to, now))
    title = formats.title(notification)
    return AlertMessage(id_, receiver.name, notification.endpoint, title, now, now, body)


def _seen(alert: Alert, now: float) -> Alert:
    return replace(alert, held_at=now) if alert.state == "firing" else alert


def _new_id() -> str:
    return f"{int(time.time() * 1e3):012x}{os.urandom(6).hex()}"
