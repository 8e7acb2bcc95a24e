"""Webhooks: what is sent, how it is signed, and when to try again.

Form and signature are those of the Standard Webhooks specification (version 1, symmetric).
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
TOO_EARLY_AGAIN = frozenset({429, 503})
FACTOR = 3.0

WebhookOutcome = Literal["delivered", "retry", "given_up"]


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long and how often to try. Seconds."""

    first_s: float = 5.0
    longest_s: float = 3 * 3600.0
    give_up_s: float = 12 * 3600.0


@dataclass(frozen=True, slots=True)
class WebhookLimits:
    """How much at once, in all and for one receiver, and the longest that a try takes (seconds)."""

    at_once: int = 64
    per_host: int = 4
    timeout_s: float = 10.0


@dataclass(frozen=True, slots=True)
class WebhookAttempt:
    """What came of one try: the receiver's status, or ``problem`` where there was no answer.

    ``retry_after_s`` is what a receiver that is too busy asked for.
    """

    status: int | None
    problem: str
    took_ms: float
    retry_after_s: float | None = None

    @property
    def answered(self) -> bool:
        """Whether anybody is there."""
        return self.status is not None


@dataclass(frozen=True, slots=True)
class RetryDecision:
    """What becomes of a webhook after a try; ``delay_s`` until the next one, where there is one."""

    outcome: WebhookOutcome
    delay_s: float = 0.0


def decide(
    sent: WebhookAttempt, attempt: int, age_s: float, draw: float, policy: RetryPolicy
) -> RetryDecision:
    """Whether and when to try again. ``attempt`` counts from 1; ``age_s``: since the job ended; ``draw``: a
    random number in [0, 1).

    The wait grows by a factor of three and is spread over half to one and a half of it, so that what failed
    together does not come back together.
    """
    if sent.status is not None and 200 <= sent.status < 300:
        return RetryDecision("delivered")
    if sent.status == GONE:
        return RetryDecision("given_up")
    delay = min(policy.longest_s, policy.first_s * FACTOR ** min(attempt - 1, 30)) * (0.5 + draw)
    if sent.status in TOO_EARLY_AGAIN and sent.retry_after_s is not None:
        delay = max(delay, min(sent.retry_after_s, policy.longest_s))
    if age_s + delay > policy.give_up_s:
        return RetryDecision("given_up")
    return RetryDecision("retry", delay)


def pause_s(failures: int, draw: float, policy: RetryPolicy) -> float:
    """How long a receiver that did not answer ``failures`` times in a row is left alone, by all webhooks."""
    if failures < 3:
        return 0.0
    return min(60.0, policy.first_s * 2.0 ** min(failures - 3, 10)) * (0.5 + draw)


def webhook_id(job: str) -> str:
    """The id of a job's one webhook, the same at each try: receivers know a second delivery by it."""
    return f"msg_{job}"


def secret_of(master: bytes, principal: str) -> str:
    """The secret that a principal's webhooks are signed with, in the form that verifiers take."""
    derived = hmac.digest(master, b"webhooks of " + principal.encode(), hashlib.sha256)
    return SECRET_PREFIX + base64.b64encode(derived).decode()


def body_of(job: dict[str, Any], finished_ms: int) -> bytes:
    """What is sent: ``type`` is ``job.<state>``, ``data`` the job as ``GET /v1/jobs/{id}`` shows it."""
    at = datetime.fromtimestamp(finished_ms / 1e3, UTC).isoformat(timespec="milliseconds")
    return orjson.dumps({"type": f"job.{job['status']}", "timestamp": at.replace("+00:00", "Z"), "data": job})


def signed_headers(secret: str, id_: str, at_s: int, body: bytes) -> dict[str, str]:
    """The headers of a delivery at ``at_s`` (whole seconds since the epoch)."""
    key = base64.b64decode(secret.removeprefix(SECRET_PREFIX))
    signature = hmac.digest(key, b".".join((id_.encode(), str(at_s).encode(), body)), hashlib.sha256)
    return {
        "webhook-id": id_,
        "webhook-timestamp": str(at_s),
        "webhook-signature": f"v1,{base64.b64encode(signature).decode()}",
    }
