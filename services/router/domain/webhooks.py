"""The body, the cryptographic signature and the retries of webhooks. Pure.

The body and the signature follow the Standard Webhooks specification (version 1, symmetric).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import orjson

SECRET_PREFIX = "whsec_"
GONE = 410
BUSY = frozenset({429, 503})
FACTOR = 3.0

WebhookOutcome = Literal["delivered", "retry", "given_up"]


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Limits for the retries of a webhook. All values are in seconds.

    ``first_s``, ``longest_s``: the first and the longest wait between two attempts. ``give_up_s``: the age of
    a webhook at which it is given up.
    """

    first_s: float = 5.0
    longest_s: float = 3 * 3600.0
    give_up_s: float = 12 * 3600.0


@dataclass(frozen=True, slots=True)
class WebhookLimits:
    """Limits on webhook attempts.

    ``max_in_flight``: the most attempts in flight to all receivers together. ``per_host``: the most attempts
    in flight to one host. ``timeout_s``: the longest time in seconds that one attempt may take.
    """

    max_in_flight: int = 64
    per_host: int = 4
    timeout_s: float = 10.0


@dataclass(frozen=True, slots=True)
class WebhookAttempt:
    """The result of one attempt.

    ``status``: the HTTP status of the receiver's response; None without a response. ``problem``: what failed,
    as text. ``retry_after_s``: the seconds in the response's header ``Retry-After``.
    """

    status: int | None
    problem: str
    took_ms: float
    retry_after_s: float | None = None

    @property
    def answered(self) -> bool:
        """Return True if the receiver has responded, with any status."""
        return self.status is not None


@dataclass(frozen=True, slots=True)
class RetryDecision:
    """The outcome of an attempt. ``delay_s``: seconds to the next attempt, if the outcome is ``retry``."""

    outcome: WebhookOutcome
    delay_s: float = 0.0


def decide(
    result: WebhookAttempt, attempt: int, age_s: float, draw: float, policy: RetryPolicy
) -> RetryDecision:
    """Decide if a webhook is sent again, and after which delay.

    ``attempt``: the number of the attempt that has just ended, from 1. ``age_s``: seconds since the end of
    the job. ``draw``: a random number in [0, 1). Each delay is three times as long as the one before, up to
    ``policy.longest_s``. A random factor from 0.5 to 1.5 spreads the retries of webhooks that failed at the
    same time.
    """
    if result.status is not None and 200 <= result.status < 300:
        return RetryDecision("delivered")
    if result.status == GONE:
        return RetryDecision("given_up")
    delay = min(policy.longest_s, policy.first_s * FACTOR ** min(attempt - 1, 30)) * (0.5 + draw)
    if result.status in BUSY and result.retry_after_s is not None:
        delay = max(delay, min(result.retry_after_s, policy.longest_s))
    if age_s + delay > policy.give_up_s:
        return RetryDecision("given_up")
    return RetryDecision("retry", delay)


def pause_s(failures: int, draw: float, policy: RetryPolicy) -> float:
    """Return a receiver's pause in seconds after ``failures`` attempts in a row without a response.

    The pause is 0 for the first two failures.
    """
    if failures < 3:
        return 0.0
    return min(60.0, policy.first_s * 2.0 ** min(failures - 3, 10)) * (0.5 + draw)


def webhook_id(job: str) -> str:
    """Return the id of a job's webhook. All attempts have the same id, so receivers can detect duplicates."""
    return f"msg_{job}"


def secret_of(master: bytes, principal: str) -> str:
    """Return the secret that signs a principal's webhooks, in the format of Standard Webhooks."""
    derived = hmac.digest(master, b"webhooks of " + principal.encode(), hashlib.sha256)
    return SECRET_PREFIX + base64.b64encode(derived).decode()


def body_of(job: dict[str, Any], finished_ms: int) -> bytes:
    """Return a webhook's body.

    ``type`` is ``job.<state>``. ``data`` is the job as in ``GET /v1/jobs/{id}``.
    """
    at = datetime.fromtimestamp(finished_ms / 1e3, UTC).isoformat(timespec="milliseconds")
    return orjson.dumps({"type": f"job.{job['status']}", "timestamp": at.replace("+00:00", "Z"), "data": job})


def signed_headers(secret: str, id_: str, at_s: int, body: bytes) -> dict[str, str]:
    """Return the headers of an attempt at ``at_s`` (whole seconds since the epoch)."""
    key = base64.b64decode(secret.removeprefix(SECRET_PREFIX))
    signature = hmac.digest(key, b".".join((id_.encode(), str(at_s).encode(), body)), hashlib.sha256)
    return {
        "webhook-id": id_,
        "webhook-timestamp": str(at_s),
        "webhook-signature": f"v1,{base64.b64encode(signature).decode()}",
    }
