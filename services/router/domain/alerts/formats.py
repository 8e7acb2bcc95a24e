"""The messages about alerts: a signed webhook's body, Slack's JSON, and an e-mail. Pure."""

from __future__ import annotations

from datetime import UTC, datetime
from email.message import EmailMessage
from email.utils import format_datetime
from typing import Any

import orjson

from services.router.domain.alerts.notifications import Notification
from services.router.domain.alerts.states import Alert

_COLOURS = {"critical": "#d40e0d", "warning": "#daa038", "resolved": "#2eb886"}


def title(notification: Notification) -> str:
    """Return the title in one line, such as ``FIRING digits: ErrorRate, QueueAge``."""
    names = list(dict.fromkeys(each.rule for each in notification.alerts))
    return f"{notification.state.upper()} {notification.endpoint}: {', '.join(names)}"


def webhook_body(notification: Notification, at: float) -> bytes:
    """Return the body of a Standard Webhook; ``type`` is ``alert.firing`` or ``alert.resolved``."""
    data = {
        "endpoint": notification.endpoint,
        "title": title(notification),
        "alerts": [public(each) for each in notification.alerts],
    }
    return orjson.dumps({"type": f"alert.{notification.state}", "timestamp": _iso(at), "data": data})


def slack_body(notification: Notification) -> bytes:
    """Return the JSON for Slack's incoming webhooks. Mattermost and others accept the same format."""
    attachments = [
        {
            "color": _COLOURS["resolved" if alert.state == "resolved" else alert.severity],
            "title": f"{alert.rule} ({alert.state})",
            "text": f"{escaped(alert.summary)}\n`{escaped(alert.remedy)}`",
            "fallback": f"{alert.rule}: {escaped(alert.summary)}",
            "ts": int(alert.changed_at),
        }
        for alert in notification.alerts
    ]
    return orjson.dumps({"text": escaped(title(notification)), "attachments": attachments})


def email_of(notification: Notification, id_: str, sender: str, to: str, at: float) -> EmailMessage:
    """Return a notification as an e-mail.

    The Message-ID contains ``id_``. All attempts to send this e-mail use the same Message-ID, so mail servers
    can detect duplicates.
    """
    text = "\n\n".join(map(_paragraph, notification.alerts)) + "\n"
    return email_with(title(notification), text, id_, sender, to, at)


def email_with(title: str, text: str, id_: str, sender: str, to: str, at: float) -> EmailMessage:
    """Return an e-mail with this title and text. The other parameters are those of :func:`email_of`."""
    message = EmailMessage()
    message["From"], message["To"] = sender, to
    message["Subject"] = f"[Tidegate] {title}"
    message["Date"] = format_datetime(datetime.fromtimestamp(at, UTC))
    message["Message-ID"] = f"<{id_}@tidegate>"
    message["Auto-Submitted"] = "auto-generated"
    message.set_content(text)
    return message


def is_address(text: str) -> bool:
    """Return True if an e-mail to this NAME@DOMAIN can be built.

    The calling code must check an address before it stores it. A bad address would raise an error when an
    alert is sent, and this error would block all messages.
    """
    local, at, domain = text.partition("@")
    if not (at and local and domain) or any(each.isspace() for each in text) or "\0" in text:
        return False
    message = EmailMessage()
    try:
        message["To"] = text
        bytes(message)
    except Exception:  # Python's header parser raises many kinds of errors
        return False
    return True


def public(alert: Alert) -> dict[str, Any]:
    """Return an alert as users see it."""
    return {
        "id": alert.id,
        "endpoint": alert.endpoint,
        "rule": alert.rule,
        "subject": alert.subject,
        "severity": alert.severity,
        "state": alert.state,
        "summary": alert.summary,
        "value": alert.value,
        "limit": alert.limit,
        "since": alert.since,
        "fired_at": alert.fired_at or None,
        "resolved_at": alert.resolved_at or None,
        "remedy": alert.remedy,
    }


def escaped(text: str) -> str:
    """Escape ``&``, ``<`` and ``>``, which have a meaning in Slack's text."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _paragraph(alert: Alert) -> str:
    lines = [
        f"{alert.rule} ({alert.severity}) of {alert.endpoint}: {alert.state}",
        alert.summary,
        f"Since {_iso(alert.since)}",
    ]
    if alert.state == "resolved":
        lines.append(f"Resolved {_iso(alert.resolved_at)}")
    else:
        lines.append(f"Next: {alert.remedy}")
    return "\n".join(lines)


def _iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
