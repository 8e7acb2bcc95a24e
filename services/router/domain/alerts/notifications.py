"""Decide which alerts are sent now, and which of them each receiver gets. Pure.

One message has the alerts of one endpoint. The decision compares the state of each alert with the state that
its last message reported. So a restart neither loses a message nor sends it twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from services.router.domain.alerts.silences import Silence, silence_of
from services.router.domain.alerts.states import Alert, Key

Kind = Literal["webhook", "slack", "email"]
_RANK = {"critical": 0, "warning": 1}


@dataclass(frozen=True, slots=True)
class Receiver:
    """A receiver of the alerts whose severity is ``severity`` or worse, or of changes in the registry.

    ``to``: a URL or an e-mail address. ``changes``: the kinds of objects whose changes the receiver gets. If
    it is not empty, the receiver gets no alerts. ``endpoint``: the endpoints of the alerts, or the names of
    the changed objects; ``*`` and ``?`` are wildcards.
    """

    name: str
    kind: Kind
    to: str
    endpoint: str = "*"
    severity: Literal["warning", "critical"] = "warning"
    changes: tuple[str, ...] = ()

    def wants_change(self, kind: str, name: str) -> bool:
        """Return True if the receiver gets the changes of this object.

        The name of a version or an alias begins with the name of its model. Only the model's name is compared
        with ``endpoint``.
        """
        return kind in self.changes and fnmatchcase(name.partition("/")[0], self.endpoint)

    def wants(self, alert: Alert) -> bool:
        """Return True if the receiver gets this alert."""
        if self.changes:
            return False
        return fnmatchcase(alert.endpoint, self.endpoint) and _RANK[alert.severity] <= _RANK[self.severity]

    def to_json(self) -> dict[str, Any]:
        """Return the receiver as a document."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Receiver:
        """Return the receiver from a document."""
        fields = {k: v for k, v in document.items() if k in cls.__dataclass_fields__}
        return cls(**fields | {"changes": tuple(document.get("changes", ()))})

    def public(self) -> dict[str, Any]:
        """Return the receiver without the secret part of its address."""
        shown = self.to if self.kind == "email" else "/".join(self.to.split("/")[:3]) + "/..."
        return asdict(self) | {"to": shown}


@dataclass(frozen=True, slots=True)
class Pace:
    """The timing of messages, in seconds.

    ``group_s``: the time for which changes of an endpoint's alerts wait, so that one message reports them
    together. ``repeat_s``: the time after which a firing alert is sent again.
    """

    group_s: float = 10.0
    repeat_s: float = 4 * 3600.0


@dataclass(frozen=True, slots=True)
class Notification:
    """The alerts of one endpoint that are sent in one message."""

    endpoint: str
    alerts: tuple[Alert, ...]

    @property
    def firing(self) -> list[Alert]:
        """Return the firing alerts of this notification."""
        return [each for each in self.alerts if each.state == "firing"]

    @property
    def state(self) -> Literal["firing", "resolved"]:
        """Return ``firing`` if an alert of the notification fires, otherwise ``resolved``."""
        return "firing" if self.firing else "resolved"


def due(
    alerts: Mapping[Key, Alert], silences: Iterable[Silence], now: float, pace: Pace
) -> tuple[list[Notification], dict[Key, Alert]]:
    """Return the notifications that must be sent now, and all alerts as they are afterwards.

    In the returned alerts, the alerts of these notifications are already marked as sent.
    """
    silences = list(silences)
    after = dict(alerts)
    waiting: dict[str, list[Alert]] = {}
    for key, alert in alerts.items():
        if not _news(alert, now, pace):
            continue
        if silence_of(alert, silences, now) is not None:
            if alert.state == "resolved":  # an alert that is resolved during a silence is not reported later
                after[key] = replace(alert, notified="", notified_at=now)
            continue
        waiting.setdefault(alert.endpoint, []).append(alert)
    found = []
    for endpoint, group in waiting.items():
        if now - min(_since(each) for each in group) < pace.group_s:
            continue
        group.sort(key=lambda alert: (alert.state != "firing", _RANK[alert.severity], alert.rule))
        found.append(Notification(endpoint, tuple(group)))
        for alert in group:
            sent: Literal["firing", "resolved"] = "firing" if alert.state == "firing" else "resolved"
            after[alert.key] = replace(alert, notified=sent, notified_at=now)
    return found, after


def _since(alert: Alert) -> float:
    return alert.changed_at


def _news(alert: Alert, now: float, pace: Pace) -> bool:
    """Return True if the alert must be sent: it newly fires, it still fires and is due again, or it ended.

    The end is sent only if a message has reported that the alert fires.
    """
    if alert.state == "firing":
        new = alert.notified != "firing" or alert.notified_at < alert.fired_at
        return new or now - alert.notified_at >= pace.repeat_s
    return alert.state == "resolved" and alert.notified == "firing"


def for_receiver(notification: Notification, receiver: Receiver) -> Notification | None:
    """Return the notification with only the alerts that this receiver gets; None if it gets none."""
    alerts = tuple(each for each in notification.alerts if receiver.wants(each))
    return Notification(notification.endpoint, alerts) if alerts else None
