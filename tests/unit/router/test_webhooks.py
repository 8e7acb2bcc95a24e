"""Webhooks: signatures that the reference verifier accepts, and retries."""

from __future__ import annotations

import time

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from services.router.domain.webhooks import (
    RetryPolicy,
    WebhookAttempt,
    body_of,
    decide,
    pause_s,
    secret_of,
    signed_headers,
    webhook_id,
)

pytestmark = pytest.mark.unit

MASTER = b"m" * 32
POLICY = RetryPolicy(first_s=5.0, longest_s=3600.0, give_up_s=86_400.0)
BODY = body_of({"id": "0a", "status": "succeeded", "text": "naïve"}, 1_700_000_000_123)


def sent(status: int | None = None, retry_after_s: float | None = None) -> WebhookAttempt:
    return WebhookAttempt(status, "" if status else "no answer", 1.0, retry_after_s)


def test_an_unmodified_verifier_accepts_it():
    secret = secret_of(MASTER, "team-a")
    headers = signed_headers(secret, webhook_id("0a"), int(time.time()), BODY)
    event = Webhook(secret).verify(BODY, headers)
    assert event == {
        "type": "job.succeeded",
        "timestamp": "2023-11-14T22:13:20.123Z",
        "data": {"id": "0a", "status": "succeeded", "text": "naïve"},
    }
    assert headers["webhook-id"] == "msg_0a"


@pytest.mark.parametrize("change", ["body", "id", "time", "principal"])
def test_a_verifier_refuses_changed_content(change):
    now = int(time.time())
    headers = signed_headers(secret_of(MASTER, "team-a"), "msg_0a", now, BODY)
    if change == "id":
        headers["webhook-id"] = "msg_0b"
    if change == "time":
        headers["webhook-timestamp"] = str(now - 1)
    verifier = Webhook(secret_of(MASTER, "team-b" if change == "principal" else "team-a"))
    with pytest.raises(WebhookVerificationError):
        verifier.verify(BODY + b" " if change == "body" else BODY, headers)


def test_each_principal_has_a_secret_of_its_own_that_stays():
    assert secret_of(MASTER, "a") == secret_of(MASTER, "a")
    assert len({secret_of(MASTER, "a"), secret_of(MASTER, "b"), secret_of(b"n" * 32, "a")}) == 3


def test_delivered_by_any_2xx():
    for status in (200, 202, 204):
        assert decide(sent(status), 1, 0.0, 0.5, POLICY).outcome == "delivered"


@pytest.mark.parametrize("status", [None, 301, 302, 400, 404, 429, 500, 503])
def test_any_other_status_is_retried(status):
    assert decide(sent(status), 1, 0.0, 0.5, POLICY) == decide(sent(None), 1, 0.0, 0.5, POLICY)
    assert decide(sent(status), 1, 0.0, 0.5, POLICY).outcome == "retry"


def test_a_410_ends_the_webhook():
    assert decide(sent(410), 1, 0.0, 0.5, POLICY).outcome == "given_up"


def test_waits_grow_and_are_bounded_and_spread():
    middle = [decide(sent(), n, 0.0, 0.5, POLICY).delay_s for n in range(1, 9)]
    assert middle == [5.0, 15.0, 45.0, 135.0, 405.0, 1215.0, 3600.0, 3600.0]
    assert decide(sent(), 1, 0.0, 0.0, POLICY).delay_s == 2.5
    assert decide(sent(), 1, 0.0, 0.999, POLICY).delay_s == pytest.approx(7.495)
    assert decide(sent(), 10**6, 0.0, 0.5, POLICY).delay_s == 3600.0


def test_a_webhook_is_given_up_after_hours():
    age, attempt = 0.0, 1
    while (event := decide(sent(), attempt, age, 0.5, POLICY)).outcome == "retry":
        age, attempt = age + event.delay_s, attempt + 1
    assert 22 * 3600 < age <= POLICY.give_up_s
    assert event.outcome == "given_up"
    assert attempt < 40


def test_retry_after_of_a_busy_receiver():
    assert decide(sent(429, 60.0), 1, 0.0, 0.5, POLICY).delay_s == 60.0
    assert decide(sent(503, 1.0), 1, 0.0, 0.5, POLICY).delay_s == 5.0
    assert decide(sent(429, 1e9), 1, 0.0, 0.5, POLICY).delay_s == POLICY.longest_s
    assert decide(sent(500, 60.0), 1, 0.0, 0.5, POLICY).delay_s == 5.0


def test_the_pause_of_a_dead_receiver():
    assert [pause_s(n, 0.5, POLICY) for n in (0, 1, 2)] == [0.0, 0.0, 0.0]
    assert [pause_s(n, 0.5, POLICY) for n in (3, 4, 5, 9)] == [5.0, 10.0, 20.0, 60.0]
