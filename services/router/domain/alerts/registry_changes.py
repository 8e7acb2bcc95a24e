"""The messages about changes in the registry: a signed webhook's body, Slack's JSON, and an e-mail. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from email.message import EmailMessage
from typing import Any

import orjson

from services.router.domain.alerts.formats import email_with, escaped


@dataclass(frozen=True, slots=True)
class RegistryChange:
    """A change in the registry: an entry of its audit log.

    ``at``: the time of the change, in ISO 8601. ``by``: the name of the principal that made it. ``before``,
    ``after``: the object, or the changed fields, before and after the change.
    """

    id: int
    at: str
    kind: str
    name: str
    action: str
    by: str
    revision: int
    before: Mapping[str, Any] | None = None
    after: Mapping[str, Any] | None = None

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> RegistryChange:
        """Return the change that an entry of the audit log describes."""
        names = ("id", "at", "kind", "name", "action", "revision", "before", "after")
        return cls(by=entry["principal_name"] or entry["principal"], **{name: entry[name] for name in names})

    @property
    def title(self) -> str:
        """Return the change in one line, such as ``version fraud/3 created by ann``."""
        # The name of a principal may come from a token of another system, and a mail header is one line.
        by = " ".join(self.by.split())
        return f"{self.kind} {self.name} {self.action} by {by}"

    def webhook_body(self) -> bytes:
        """Return the body of a Standard Webhook. ``type`` is for example ``version.created``."""
        document = {"type": f"{self.kind}.{self.action}", "timestamp": self.at, "data": asdict(self)}
        return orjson.dumps(document)

    def slack_body(self) -> bytes:
        """Return the JSON for Slack's incoming webhooks."""
        return orjson.dumps({"text": escaped(self.title)})

    def email(self, id_: str, sender: str, to: str, at: float) -> EmailMessage:
        """Return the change as an e-mail.

        ``id_``: a part of its Message-ID. ``at``: the Unix time, in seconds, of the header Date.
        """
        text = f"{self.title}\nAt {self.at}, revision {self.revision}\nDetails: tidegate audit\n"
        return email_with(self.title, text, id_, sender, to, at)


# The change in a test message. Receivers recognize it by the id 0.
TEST = RegistryChange(0, "1970-01-01T00:00:00Z", "version", "test/1", "created", "a test of Tidegate", 0)
