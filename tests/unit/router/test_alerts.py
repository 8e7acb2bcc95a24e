"""Alerts: when they fire and end, and which messages are sent, also over a restart."""

from __future__ import annotations

import itertools
from dataclasses import replace

import orjson
import pytest

from services.router.domain.alerts import formats
from services.router.domain.alerts.alert_rules import (
    BY_NAME,
    FAST,
    RULES,
    SLOW,
    Breach,
    breaches,
    factor,
    limits_of,
)
from services.router.domain.alerts.cost_findings import cost_findings
from services.router.domain.alerts.error_budgets import error_budgets
from services.router.domain.alerts.facts import DAY, HOUR, Counts, Facts, Finding, baseline, totals
from services.router.domain.alerts.notifications import Notification, Pace, Receiver, due, for_receiver
from services.router.domain.alerts.registry_changes import RegistryChange
from services.router.domain.alerts.silences import Silence
from services.router.domain.alerts.states import Alert, Key, changes, end_removed, step
from services.router.domain.alerts.version_findings import drift_findings, drift_states, quality_findings
from services.router.domain.watch.history import Brief, History
from services.router.domain.watch.window import Window
from tidegate.kernel.protocol.latency_buckets import bucket_of
from tidegate.kernel.protocol.models import Endpoint, Target
from tidegate.kernel.protocol.service_level import AlertLimits, ServiceLevel

pytestmark = pytest.mark.unit

T0 = 1_700_000_000.0
KEY = ("m", "ErrorRate", "")
BREACH = Breach(10.0, 5.0, "10 % failed")
PACE = Pace(group_s=10.0, repeat_s=3600.0)


def window(answers: int = 100, failed: int = 0, ms: float = 10.0, **more) -> Window:
    outcomes = {"ok": answers} | ({"overloaded": failed} if failed else {})
    found = Window(T0 - 300, T0, outcomes=outcomes, failed=failed, **more)
    found.times[0, bucket_of(ms / 1e3)] = answers
    return found


def facts(recent: Window | None = None, **more) -> Facts:
    recent = recent or window()
    return Facts("m", recent, more.pop("quarter", recent), **more)


def firing(given: Facts) -> set[str]:
    return {rule for _, rule, _ in breaches(given)}


class Clock:
    """Alerts that are evaluated and sent, as the router does it."""

    def __init__(self) -> None:
        self.alerts: dict[Key, Alert] = {}
        self.silences: list[Silence] = []
        self.sent: list[Notification] = []
        self.events: list[Alert] = []
        self._ids = map(str, itertools.count(1))

    def at(self, seconds: float, *keys: Key) -> list[str]:
        """Evaluate with these conditions; return the titles of the messages."""
        now = T0 + seconds
        after = step(self.alerts, dict.fromkeys(keys, BREACH), now, lambda: next(self._ids))
        self.events += changes(self.alerts, after)
        found, self.alerts = due(after, self.silences, now, PACE)
        # What a restart would read from the disk.
        self.alerts = {
            k: Alert.from_json(orjson.loads(orjson.dumps(a.to_json()))) for k, a in self.alerts.items()
        }
        self.sent += found
        return [formats.title(each) for each in found]


def test_a_quiet_endpoint_has_no_alert():
    assert firing(facts()) == set()
    assert firing(facts(Window(T0, T0))) == set()


def test_errors():
    assert firing(facts(window(90, 10))) == {"ErrorRate"}
    assert firing(facts(window(96, 4))) == set()
    assert firing(facts(window(0, 10))) == set()  # too few requests
    assert firing(facts(window(96, 4), limits=AlertLimits(error_rate=1))) == {"ErrorRate"}
    assert firing(facts(window(90, 10), limits=AlertLimits(off=["ErrorRate"]))) == set()
    (breach,) = breaches(facts(window(90, 10))).values()
    assert breach.summary == "10.0 % of 100 requests failed in 5 minutes, mostly overloaded (limit 5 %)"


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ({HOUR: 20, 300.0: 20}, {"ErrorBudgetBurn"}),
        ({HOUR: 20, 300.0: 0}, set()),  # it is over
        ({HOUR: 14, 300.0: 20}, set()),
        ({6 * HOUR: 7, 1800.0: 7}, {"ErrorBudgetBurn"}),
        ({3 * DAY: 2, 6 * HOUR: 2}, {"ErrorBudgetBurnSlow"}),
    ],
)
def test_burn_rates_of_an_availability_of_99_9(bad, expected):
    counts = {seconds: Counts(1000, failed, 0) for seconds, failed in bad.items()}
    slo = ServiceLevel(availability=99.9)
    assert [factor(burn, slo) for burn in (*FAST, *SLOW)] == pytest.approx([14.4, 6, 1])
    assert firing(facts(totals=counts, slo=slo)) == expected


def test_slow_answers_burn_the_budget_of_the_latency():
    slo = ServiceLevel(latency_ms=200, latency_target=99)
    counts = {HOUR: Counts(1000, 0, 200), 300.0: Counts(1000, 100, 100)}
    assert firing(facts(totals=counts, slo=slo)) == {"LatencyBudgetBurn"}


def test_the_other_rules():
    usual = baseline(Brief(T0 - 60 * n, 100, 0, 0, 0.005, 0.01) for n in range(40))
    assert baseline(Brief(T0, 100, 0, 0, 0.005, 0.01) for _ in range(5)) is None
    assert firing(facts(window(ms=15), baseline=usual)) == set()
    assert firing(facts(window(ms=30), baseline=usual)) == {"LatencyAboveBaseline"}
    assert firing(facts(queue_age_s=11)) == {"QueueAge"}
    assert firing(facts(quarter=window(dead=1, restarts=3))) == {"DeadLetters", "ReplicaFlapping"}
    found = [Finding("Drift", "m", name, 0.3, 0.1, "x") for name in ("age", "size")]
    assert set(breaches(facts(findings=found))) == {("m", "Drift", "age"), ("m", "Drift", "size")}
    assert limits_of(facts(baseline=usual))["LatencyAboveBaseline"] == pytest.approx(0.02)


def test_counts_of_long_windows_come_from_ticks_minutes_and_hours():
    history, start = History(), T0 // 3600 * 3600
    for minute in range(60 * 80):
        at = start + minute * 60
        history.add({"m": Window(at, at + 60, outcomes={"ok": 9}, failed=1)})
    found = totals(history.of("m"), start + 80 * HOUR)
    assert found[HOUR] == Counts(600, 60, 0)
    assert found[6 * HOUR].requests == pytest.approx(3600, rel=0.02)
    assert found[3 * DAY].requests == pytest.approx(43_200, rel=0.02)


def test_an_alert_waits_fires_once_and_recovers():
    clock = Clock()
    assert clock.at(0, KEY) == []
    assert clock.alerts[KEY].state == "pending"
    assert clock.at(59, KEY) == []
    assert clock.at(60, KEY) == []
    assert clock.alerts[KEY].state == "firing"
    assert clock.at(70, KEY) == ["FIRING m: ErrorRate"]
    assert clock.at(75, KEY) == []
    assert clock.at(100) == []  # it is kept for a minute
    assert clock.at(130, KEY) == []
    assert clock.at(191) == []
    assert clock.alerts[KEY].state == "resolved"
    assert clock.at(202) == ["RESOLVED m: ErrorRate"]
    assert clock.at(300) == []
    assert [each.state for each in clock.events] == ["firing", "resolved"]
    assert clock.at(5000) == []
    assert clock.alerts == {}


def test_a_short_breach_sends_nothing():
    clock = Clock()
    clock.at(0, KEY)
    assert clock.at(30) == []
    assert clock.alerts == {}
    assert clock.sent == []


def test_alerts_of_an_endpoint_are_sent_together_and_repeated():
    clock = Clock()
    other = ("m", "QueueAge", "")
    clock.at(0, KEY)
    clock.at(5, KEY, other)
    clock.at(60, KEY, other)
    assert clock.at(70, KEY, other) == ["FIRING m: ErrorRate, QueueAge"]
    assert clock.at(3000, KEY, other) == []
    assert clock.at(3700, KEY, other) == ["FIRING m: ErrorRate, QueueAge"]


def test_an_alert_that_fires_again_before_its_end_was_sent_is_news():
    clock = Clock()
    clock.at(0, KEY)
    clock.at(60, KEY)
    clock.at(70, KEY)
    clock.at(140)
    assert clock.alerts[KEY].state == "resolved"
    clock.at(141, KEY)
    assert clock.at(150) == []  # a pending alert that ended: its receivers still wait for the end
    assert clock.at(160) == ["RESOLVED m: ErrorRate"]


def test_a_silent_alert_is_sent_when_the_silence_ends():
    clock = Clock()
    clock.silences = [Silence("s", "m*", "Error*", "*", T0, T0 + 1000, "test", "me")]
    clock.at(0, KEY)
    clock.at(60, KEY)
    assert clock.at(500, KEY) == []
    assert clock.at(1001, KEY) == ["FIRING m: ErrorRate"]
    clock.silences = [Silence("s", "*", "*", "critical", T0, T0 + 9000, "test", "me")]
    clock.at(1100)
    assert clock.at(1200) == []
    assert clock.at(9001) == []  # nothing is sent about an alert that ended while it was silent
    assert Silence("s", "*", "*", "warning", T0, T0 + 9, "", "").matches(clock.sent[0].alerts[0]) is False


def test_receivers_get_what_they_want():
    alert = step({KEY: fired()}, {KEY: BREACH}, T0 + 60, lambda: "1")[KEY]
    mild = replace(alert, rule="QueueAge", severity="warning")
    both = Notification("m", (alert, mild))
    page = Receiver("page", "webhook", "https://example.com/secret", severity="critical")
    assert for_receiver(both, page) == Notification("m", (alert,))
    assert for_receiver(both, replace(page, endpoint="other*")) is None
    assert for_receiver(Notification("m", (mild,)), page) is None
    assert page.public()["to"] == "https://example.com/..."


def test_receivers_of_changes_get_the_kinds_and_names_that_they_want():
    ci = Receiver("ci", "webhook", "https://example.com/", "fraud*", changes=("version", "endpoint"))
    assert Receiver.from_json(orjson.loads(orjson.dumps(ci.to_json()))) == ci
    assert ci.wants_change("version", "fraud-eu/3")
    assert ci.wants_change("endpoint", "fraud")
    assert not ci.wants_change("version", "digits/3")
    assert not ci.wants_change("deployment", "fraud-v3")
    alert = step({KEY: fired()}, {KEY: BREACH}, T0 + 60, lambda: "1")[KEY]
    assert not replace(ci, endpoint="*").wants(alert), "it gets changes instead of alerts"
    old = Receiver.from_json({"name": "ops", "kind": "webhook", "to": "https://example.com/"})
    assert old.wants(alert), "stored by an older release"
    assert not old.wants_change("version", "m/1")


def test_a_change_as_a_message():
    entry = {
        "id": 7, "at": "2025-05-31T10:00:02Z", "kind": "alias", "name": "m/<best>", "action": "updated",
        "principal": "k1", "principal_name": "", "revision": 9,
        "before": {"version": 1}, "after": {"version": 2},
    }  # fmt: skip
    change = RegistryChange.from_entry(entry)
    assert change.title == "alias m/<best> updated by k1"
    body = orjson.loads(change.webhook_body())
    assert (body["type"], body["timestamp"]) == ("alias.updated", entry["at"])
    assert (body["data"]["before"], body["data"]["after"], body["data"]["id"]) == (
        {"version": 1},
        {"version": 2},
        7,
    )
    assert orjson.loads(change.slack_body()) == {"text": "alias m/&lt;best&gt; updated by k1"}
    message = change.email("i", "from@x", "to@x", T0)
    assert message["Subject"] == "[Tidegate] alias m/<best> updated by k1"
    assert "revision 9" in message.get_content()
    hostile = replace(change, by="ann\r\nBcc: all@x")  # the name is in a token of another system
    assert bytes(hostile.email("i", "from@x", "to@x", T0)).count(b"\nBcc") == 0


def fired() -> Alert:
    return Alert(
        *KEY, "critical", "firing", T0, T0, 10, 5, "10 % <failed>", "tidegate diagnose m", "id", T0 + 60
    )


def test_formats():
    both = Notification(
        "m", (fired(), replace(fired(), rule="QueueAge", state="resolved", resolved_at=T0 + 90))
    )
    body = orjson.loads(formats.webhook_body(both, T0))
    assert (body["type"], body["timestamp"]) == ("alert.firing", "2023-11-14T22:13:20Z")
    assert [each["state"] for each in body["data"]["alerts"]] == ["firing", "resolved"]
    slack = orjson.loads(formats.slack_body(both))
    assert slack["text"] == "FIRING m: ErrorRate, QueueAge"
    assert "10 % &lt;failed&gt;" in slack["attachments"][0]["text"]
    mail = formats.email_of(both, "msg_1", "from@x", "to@x", T0)
    assert (mail["Subject"], mail["Message-ID"]) == (
        "[Tidegate] FIRING m: ErrorRate, QueueAge",
        "<msg_1@tidegate>",
    )
    assert "Next: tidegate diagnose m" in mail.get_content()


def test_every_rule_has_its_own_name_and_a_remedy():
    assert len(BY_NAME) == len(RULES) == 12
    assert all(rule.remedy.startswith("tidegate ") for rule in RULES)


def test_drift_becomes_one_alert_for_each_version_and_endpoint():
    line = {
        "model": "m",
        "version": 2,
        "endpoints": ["m", "n"],
        "score": 0.3,
        "drifted": [f"c{n}" for n in range(7)],
    }
    calm = line | {"drifted": [], "version": 1}
    found = drift_findings([line, calm])
    assert [(each.endpoint, each.subject) for each in found] == [("m", "m v2"), ("n", "m v2")]
    assert found[0].summary == "7 columns of m v2 differ from the baseline: c0, c1, c2, c3, c4, ..."


def test_a_drop_of_quality_names_the_measure_that_changed_most():
    places = [{"model": "m", "version": 2, "endpoints": ["m"], "state": "drifted"}]
    line = {
        "model": "m", "version": 2, "state": "dropped",
        "window": {"measures": {"accuracy": 0.6, "rows": 9.0}}, "first": {"accuracy": 0.9, "rows": 9.0},
    }  # fmt: skip
    (found,) = quality_findings([line, line | {"state": "steady"}], places)
    assert (found.rule, found.endpoint) == ("QualityDrop", "m")
    assert found.summary == "the quality of m v2 dropped: accuracy is 0.6; in its first window it was 0.9"
    assert drift_states([*places, places[0] | {"state": "steady"}]) == {"m": "drifted"}


def test_a_cost_that_limits_replicas_is_a_finding():
    endpoint = Endpoint(name="m", targets=[Target(deployment="m-v1")], revision=1)
    status = {"rule": "budget", "reason": "the budget of the month is used up", "cost_per_hour": 2.0}
    (found,) = cost_findings([endpoint], {"m-v1": status})
    assert (found.rule, found.endpoint, found.subject, found.value) == ("CostCap", "m", "m-v1", 2.0)
    assert found.summary.endswith("the budget of the month is used up")
    assert cost_findings([endpoint], {"m-v1": {"rule": "demand"}}) == []


def test_the_rest_of_an_error_budget():
    history, slo = History(), ServiceLevel(availability=99, latency_ms=100, latency_target=90, window="1d")
    for minute in range(120):
        failed = 1 if minute < 60 else 0
        at = T0 // 3600 * 3600 + minute * 60
        history.add({"m": Window(at, at + 60, outcomes={"ok": 100 - failed}, failed=failed, slow=5)})
    first, second = error_budgets("m", slo, history.of("m"), T0 // 3600 * 3600 + 7200)
    assert (first["objective"], first["requests"], first["bad"]) == ("availability", 12_000, 60)
    assert (first["attained"], first["left"]) == (pytest.approx(99.5), pytest.approx(0.5))
    assert (first["burn"]["1h"], first["burn"]["6h"]) == (0.0, pytest.approx(0.5))
    assert (second["bad"], second["left"]) == (660, pytest.approx(0.45))
    assert next(iter(error_budgets("m", slo, History().of("m"), T0)))["left"] is None


def test_receivers_hear_the_end_of_an_alert_whose_endpoint_was_removed():
    clock = Clock()
    for seconds in range(0, 400, 20):
        clock.at(seconds, KEY)
    (alert,) = clock.alerts.values()
    assert alert.notified == "firing"
    clock.alerts = end_removed(clock.alerts, {"other"}, T0 + 400)
    assert clock.at(420) == ["RESOLVED m: ErrorRate"]
    unknown = replace(alert, state="pending", notified="")
    assert end_removed({KEY: unknown}, set(), T0) == {}
    assert end_removed({KEY: alert}, {"m"}, T0) == {KEY: alert}


@pytest.mark.parametrize(
    ("text", "fits"),
    [("a@b.org", True), ("a@[", False), ("a b@c", False), ("@c", False), ("a@b\r\nBcc: x@y", False)],
)
def test_an_address_that_no_email_can_have_is_refused(text: str, fits: bool):
    assert formats.is_address(text) is fits
