"""Read the answer's id and the outcomes from the JSON of a caller's feedback. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol import bounded_json

LONGEST_LABEL = 256
# Larger numbers are refused. The variance of a metric needs squares, and their squares may not fit into a
# float.
LARGEST = 1e100
# A caller's clock may be ahead of the gateway's clock by at most this many ms.
AHEAD_MS = 300_000
_METRIC = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
_MEMBERS = {"request_id", "idempotency_key", "score", "label", "reward", "metric", "value", "at"}
_EXAMPLE = '{"request_id": "...", "score": 0.9}'


@dataclass(frozen=True, slots=True)
class Outcome:
    """One value of a metric: a number or a label."""

    metric: str
    value: float | None
    label: str | None


@dataclass(frozen=True, slots=True)
class FeedbackItem:
    """Outcomes of one answer. ``at``: milliseconds since the epoch.

    Exactly one of ``request_id`` and ``idempotency_key`` is set; the other one is empty.
    """

    request_id: str
    idempotency_key: str
    outcomes: tuple[Outcome, ...]
    at: int


def read_item(raw: Any, now_ms: int) -> FeedbackItem:
    """Parse one item of feedback; raise BadRequest if it is invalid."""
    if not isinstance(raw, Mapping):
        raise BadRequest(f"feedback must be a JSON object, as in {_EXAMPLE}")
    if unknown := sorted(str(name) for name in raw.keys() - _MEMBERS):
        raise BadRequest(
            f"feedback has no member {unknown[0][:40]!r}; its members are {', '.join(sorted(_MEMBERS))}"
        )
    id_, key = _text(raw, "request_id"), _text(raw, "idempotency_key")
    if bool(id_) == bool(key):
        raise BadRequest(
            "feedback needs request_id (the X-Feedback-Id of an answer, or a job's id) or idempotency_key "
            "(of a job), and not both"
        )
    outcomes = _outcomes(raw)
    if not outcomes:
        raise BadRequest(f"feedback needs score, label, reward, or metric and value, as in {_EXAMPLE}")
    return FeedbackItem(id_, key, outcomes, _moment(raw.get("at"), now_ms))


def _outcomes(raw: Mapping[str, Any]) -> tuple[Outcome, ...]:
    found = [_number(name, raw[name]) for name in ("score", "reward") if raw.get(name) is not None]
    if raw.get("label") is not None:
        found.append(Outcome("label", None, _label("label", raw["label"])))
    metric, value = raw.get("metric"), raw.get("value")
    if metric is None and value is None:
        return tuple(found)
    if not isinstance(metric, str) or _METRIC.fullmatch(metric) is None or value is None:
        raise BadRequest(
            "metric and value belong together: send both. A metric's name begins with a letter and has at "
            "most 64 characters: letters, digits, '_', '.' and '-'"
        )
    if metric in {outcome.metric for outcome in found}:
        raise BadRequest(f"feedback has the metric {metric!r} twice: remove one")
    found.append(
        Outcome(metric, None, _label("value", value)) if isinstance(value, str) else _number(metric, value)
    )
    return tuple(found)


def _number(name: str, value: Any) -> Outcome:
    # This comparison is exact for integers of any size. It refuses NaN too, because it is false for NaN.
    if not isinstance(value, int | float) or not -LARGEST <= value <= LARGEST:
        raise BadRequest(
            f"{name} must be a finite number from {-LARGEST:g} to {LARGEST:g}, "
            f"got {bounded_json.shown(value)}"
        )
    return Outcome(name, float(value), None)


def _label(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    text = str(value) if isinstance(value, int | float) else value
    if not isinstance(text, str) or not 1 <= len(text) <= LONGEST_LABEL:
        raise BadRequest(f"{name} must be a string of 1..{LONGEST_LABEL} characters, a number or a boolean")
    return text


def _text(raw: Mapping[str, Any], name: str) -> str:
    value = raw.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRequest(f"{name} must be a string, got {bounded_json.shown(value)}")
    return value


def _moment(value: Any, now_ms: int) -> int:
    """Convert a time (ISO 8601 or seconds since the epoch) to ms; None means now.

    Raise BadRequest if the time is invalid, or more than ``AHEAD_MS`` ms in the future.
    """
    if value is None:
        return now_ms
    try:
        if isinstance(value, str):
            parsed = datetime.fromisoformat(value)
            seconds = parsed.replace(tzinfo=parsed.tzinfo or UTC).timestamp()
        else:
            seconds = float(value) if not isinstance(value, bool) else math.nan
        at = int(seconds * 1e3)
    except (ValueError, TypeError, OverflowError):
        at = -1
    if not 0 <= at <= now_ms + AHEAD_MS:
        raise BadRequest(
            f"'at' must be a time in ISO 8601 or in seconds since 1970, not in the future, got "
            f"{bounded_json.shown(value)}"
        )
    return at
