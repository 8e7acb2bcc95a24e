"""The states of alerts: pending, firing, resolved. Pure.

When a condition begins to hold, its alert is pending. If the condition holds for the rule's ``for_s``
seconds, the alert fires. If the condition ends earlier, the pending alert is dropped. A firing alert is
resolved when the condition has not held for ``keep_s`` seconds. Because of this wait, a value near its limit
causes few messages.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from services.router.domain.alerts.alert_rules import BY_NAME, Breach, Rule, Severity

AlertState = Literal["pending", "firing", "resolved"]
Key = tuple[str, str, str]
# Seconds for which a resolved alert is kept, so that its end can be sent.
RESOLVED_KEPT_S = 3600.0


@dataclass(frozen=True, slots=True)
class Alert:
    """An alert of an endpoint. Times are seconds since the epoch; 0 means not yet.

    ``id``: a new id each time the alert fires. ``notified``: the state that the last message reported.
    ``notified_at``: the time of that message.
    """

    endpoint: str
    rule: str
    subject: str
    severity: Severity
    state: AlertState
    since: float
    held_at: float
    value: float
    limit: float
    summary: str
    remedy: str = ""
    id: str = ""
    fired_at: float = 0.0
    resolved_at: float = 0.0
    notified: Literal["", "firing", "resolved"] = ""
    notified_at: float = 0.0

    @property
    def key(self) -> Key:
        """Return endpoint, rule and subject, which identify the alert."""
        return self.endpoint, self.rule, self.subject

    @property
    def changed_at(self) -> float:
        """Return when the alert got its current state."""
        return {"pending": self.since, "firing": self.fired_at, "resolved": self.resolved_at}[self.state]

    def to_json(self) -> dict[str, Any]:
        """Return the alert as a document."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Alert:
        """Return the alert from a document. Ignore unknown fields, which a newer release may have written."""
        return cls(**{k: v for k, v in document.items() if k in cls.__dataclass_fields__})


def step(
    alerts: Mapping[Key, Alert],
    held: Mapping[Key, Breach],
    now: float,
    new_id: Callable[[], str],
    rules: Mapping[str, Rule] = BY_NAME,
) -> dict[Key, Alert]:
    """Return all alerts after an evaluation. ``held``: the conditions that hold now."""
    found: dict[Key, Alert] = {}
    for key, breach in held.items():
        rule = rules[key[1]]
        found[key] = _held(alerts.get(key), key, rule, breach, now, new_id)
    for key, alert in alerts.items():
        if key not in held:
            after = _not_held(alert, rules.get(alert.rule), now)
            if after is not None:
                found[key] = after
    return found


def _held(
    alert: Alert | None, key: Key, rule: Rule, breach: Breach, now: float, new_id: Callable[[], str]
) -> Alert:
    endpoint, name, subject = key
    if alert is None or alert.state == "resolved":
        new = Alert(
            endpoint, name, subject, rule.severity, "pending", now, now, breach.value, breach.limit,
            breach.summary, rule.remedy.format(endpoint=endpoint),
        )  # fmt: skip
        if alert is not None and alert.notified == "firing":  # receivers do not know that it was resolved
            new = replace(
                new, id=alert.id, fired_at=alert.fired_at, notified="firing", notified_at=alert.notified_at
            )
        alert = new
    alert = replace(alert, held_at=now, value=breach.value, limit=breach.limit, summary=breach.summary)
    if alert.state == "pending" and now - alert.since >= rule.for_s:
        alert = replace(alert, state="firing", fired_at=now, id=new_id())
    return alert


def _not_held(alert: Alert, rule: Rule | None, now: float) -> Alert | None:
    if alert.state == "pending":
        # If receivers do not know yet that an earlier firing is over, resolve the alert. Otherwise drop it.
        return replace(alert, state="resolved", resolved_at=now) if alert.notified == "firing" else None
    if alert.state == "firing":
        if rule is not None and now - alert.held_at < rule.keep_s:
            return alert
        return replace(alert, state="resolved", resolved_at=now)
    return alert if now - alert.resolved_at < RESOLVED_KEPT_S else None


def end_removed(alerts: Mapping[Key, Alert], endpoints: Collection[str], now: float) -> dict[Key, Alert]:
    """Resolve or drop the alerts of removed endpoints. Return the alerts that remain.

    A firing alert is resolved, so that receivers are notified. A pending alert is dropped, unless receivers
    do not know yet that an earlier firing is over. Then it is resolved too.
    """
    found: dict[Key, Alert] = {}
    for key, alert in alerts.items():
        if alert.endpoint in endpoints or alert.state == "resolved":
            found[key] = alert
        elif alert.state == "firing" or alert.notified == "firing":
            found[key] = replace(alert, state="resolved", resolved_at=now)
    return found


def changes(before: Mapping[Key, Alert], after: Mapping[Key, Alert]) -> list[Alert]:
    """Return the alerts that fired or were resolved since ``before``, for the history."""
    found = []
    for key, alert in after.items():
        old = before.get(key)
        if (
            alert.state != "pending"
            and (old is None or (old.state, old.id) != (alert.state, alert.id))
            and alert.id
        ):
            found.append(alert)
    return found
