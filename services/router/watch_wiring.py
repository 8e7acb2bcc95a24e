"""Build the parts that watch the endpoints: the watch, the alerts, and the sender of alerts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from fastapi import FastAPI

from services.router.adapters.alert_file import AlertFile
from services.router.adapters.endpoint_metrics import EndpointMetrics
from services.router.adapters.mail_sender import MailSender
from services.router.adapters.registry_cache import RegistryCache
from services.router.adapters.watch_file import WatchFile
from services.router.adapters.webhook_sender import WebhookSender
from services.router.application.alert_runner import AlertRunner
from services.router.application.alert_sender import AlertSender
from services.router.application.change_feed import ChangeFeed
from services.router.application.dead_letters import DeadLetters
from services.router.application.diagnosis import Diagnosis
from services.router.application.endpoint_watch import EndpointWatch
from services.router.application.version_judgements import Snapshot, VersionJudgements
from services.router.domain.alerts.cost_findings import cost_findings
from services.router.domain.alerts.notifications import Pace
from services.router.settings import RouterSettings
from tidegate.kernel.store import Store

# At most this many messages are in flight at the same time, to all receivers together.
AT_ONCE = 64


class WatchWiring(NamedTuple):
    """The watch, the alerts, the sender of messages, and the feed of changes in the registry.

    The calling code must start and stop the watch, the sender and the feed together with the router.
    """

    watch: EndpointWatch
    alerts: AlertRunner
    sender: AlertSender
    changes: ChangeFeed
    mail: MailSender
    diagnosis: Diagnosis

    def attach(self, app: FastAPI, drift: Snapshot, quality: Snapshot) -> None:
        """Make the parts available to the HTTP routes of ``app``.

        ``drift``, ``quality``: functions that return judgements of versions.
        """
        judgements = app.state.judgements = VersionJudgements(drift, quality)
        self.alerts.findings.append(judgements.findings)
        self.alerts.findings.append(lambda: cost_findings(self.watch.endpoints(), self.watch.last.statuses))
        app.state.watch, app.state.alerts, app.state.alert_sender = self.watch, self.alerts, self.sender
        app.state.mail, app.state.smtp_from = self.mail, self.mail.sender
        app.state.diagnosis = self.diagnosis


def watch_of(
    settings: RouterSettings,
    store: Store,
    registry: RegistryCache,
    leads: Callable[[], bool],
    letters: DeadLetters,
    master: bytes,
) -> WatchWiring:
    """Build the parts, but do not start them. Webhook secrets are derived from ``master``."""

    def dead() -> Iterator[tuple[float, str]]:
        return ((letter.at, letter.deployment) for letter in letters.all)

    data = settings.state_path / "data"
    watch = EndpointWatch(
        store,
        registry,
        leads,
        WatchFile(data / "watch.db"),
        dead,
        every_s=settings.watch_interval_s,
        day_s=settings.watch_day_s,
    )
    file = AlertFile(data / "alerts.db")
    pace = Pace(settings.alert_group_s, settings.alert_repeat_s)
    runner = AlertRunner(watch, file, EndpointMetrics(), pace, settings.smtp_from)
    watch.after.append(runner.evaluate)
    watch.when_not_leading.append(runner.forget)
    limits = settings.webhook_limits()
    # Operators set the receivers of alerts, so private addresses are allowed.
    http = WebhookSender(allow_private=True, timeout_s=limits.timeout_s, max_in_flight=AT_ONCE)
    mail = MailSender(settings.smtp_url, settings.smtp_from, limits.timeout_s)
    sender = AlertSender(file, http, mail, master, settings.webhook_retry_policy(), leads)
    changes = ChangeFeed(registry, file, settings.smtp_from, leads)
    runner.on_messages = changes.on_messages = sender.wake
    return WatchWiring(watch, runner, sender, changes, mail, Diagnosis(watch, registry))
