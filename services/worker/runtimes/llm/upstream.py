"""Send requests to an OpenAI-compatible server that somebody else runs.

The upstream's credential comes only from the environment variable that :data:`CREDENTIAL` names. This process
reads the variable once and removes it. The credential is removed from everything that the upstream answers.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from breaker import CLOSED, Breaker, MinuteLimit
from bridge import Failure, Server, check_path, error_status, relay, usage_of
from calls import Call, Refused

CREDENTIAL = "TIDEGATE_UPSTREAM_CREDENTIAL"
# The statuses after which a request is sent again, because the upstream could not answer it. 0 means that
# there was no answer.
RETRIED = frozenset({0, 502, 503, 504})
TRIES, FIRST_PAUSE_S, LONGEST_PAUSE_S = 3, 0.2, 3.0
# The most seconds that a request waits when the Deployment has reached its limits per minute. If the wait
# would be longer, the request gets 429.
PATIENCE_S = 2.0
BYTES_PER_TOKEN, DEFAULT_ANSWER = 4, 256


def create(plan: dict[str, Any], folder: Path) -> Upstream:
    """Return the engine. It connects to the upstream only when the first request comes."""
    return Upstream(plan, os.environ.pop(CREDENTIAL, ""))


class Upstream:
    """An engine that sends requests to a server that somebody else runs.

    ``plan``: the fields of ``LlmSpec``, and the model's ``name``.
    """

    def __init__(self, plan: dict[str, Any], credential: str) -> None:
        header = plan.get("credential_header")
        sent = {header: credential} if header else {"Authorization": f"Bearer {credential}"}
        headers = sent if credential else {}
        self._plan, self._credential = plan, credential.encode()
        self._server = Server(
            plan["upstream"], headers=headers, first_s=plan.get("upstream_timeout_s") or 600.0
        )
        self._host = urlsplit(plan["upstream"]).hostname or ""
        self._lock = threading.Lock()
        self._breaker = Breaker()
        now = time.monotonic()
        self._requests = MinuteLimit(plan.get("requests_per_minute"), now)
        self._tokens = MinuteLimit(plan.get("tokens_per_minute"), now)
        self._running, self._totals = 0, [0, 0, 0]

    def call(self, path: str, body: dict[str, Any], resume: dict[str, Any] | None, call: Call) -> None:
        """Send a request, and emit the upstream's events until the last one."""
        check_path(path)
        if resume:
            raise Refused(
                500, "The stream was lost, and an upstream cannot continue it. Send the request again.",
                "server_error", "stream_not_continued",
            )  # fmt: skip
        body = _prepared(path, body, self._plan.get("upstream_model") or self._plan["name"])
        # Charge a request with no more tokens than the limit allows in one minute. Otherwise one request with
        # a large estimate could block other requests for days.
        estimate = min(estimated_tokens(body), self._plan.get("tokens_per_minute") or sys.maxsize)
        self._await_limits(estimate, call)
        reader = _UpstreamEvents(self._credential, self._host)
        with self._lock:
            self._running += 1
        try:
            self._try(path, body, reader, call)
        finally:
            self._settle(estimate, reader.usage)

    def stats(self) -> dict[str, Any]:
        """Return the known figures: slots, running requests, token totals, state of the circuit breaker."""
        with self._lock:
            prompt, answer, cached = self._totals
            state, running = self._breaker.state(time.monotonic()), self._running
        return {
            "slots": self._plan["slots"], "running": running, "waiting": 0, "prompt_tokens": prompt,
            "answer_tokens": answer, "cached_tokens": cached, "circuit": state,
        }  # fmt: skip

    def close(self) -> None:
        """Do nothing: each request closes its own connection."""

    def _try(self, path: str, body: dict[str, Any], reader: _UpstreamEvents, call: Call) -> None:
        for attempt in range(1, TRIES + 1):
            self._admit()
            try:
                relay(self._server, path, body, reader, call, on_head=self._succeed)
                if call.cancelled:
                    self._abandon()
                return
            except Failure as failure:
                self._count(failure)
                pause_s = pause_before_retry(failure.status, failure.retry_after_s, attempt)
                if pause_s is None or call.cancelled:
                    if 400 <= failure.status < 500:
                        reader.usage = [0, 0, 0]  # the upstream did not process the request
                    self._emit_failure(failure, call)
                    return
                _say(f"upstream {self._host}: {failure}; the next attempt is in {pause_s:.1f} s")
                _sleep(pause_s, call)
            except Refused:
                self._fail()
                raise

    def _await_limits(self, tokens: int, call: Call) -> None:
        """Wait until the Deployment's limits of requests and tokens per minute allow a request.

        ``tokens``: the request's estimated tokens. Raise Refused if the wait would be longer than
        ``PATIENCE_S``.
        """
        until = time.monotonic() + PATIENCE_S
        while not call.cancelled:
            with self._lock:
                now = time.monotonic()
                waits = {
                    "requests_per_minute": self._requests.wait_s(1, now),
                    "tokens_per_minute": self._tokens.wait_s(tokens, now),
                }
                name, wait_s = max(waits.items(), key=lambda item: item[1])
                if wait_s <= 0:
                    self._requests.take(1, now)
                    self._tokens.take(tokens, now)
                    return
            if now + wait_s > until:
                refused = Refused(
                    429, f"The limit {name}={self._plan[name]} of this upstream is reached. Try again in "
                    f"{wait_s:.0f} s.", "requests", "rate_limit_exceeded",
                )  # fmt: skip
                refused.retry_after_s = wait_s
                raise refused
            _sleep(wait_s, call)

    def _settle(self, estimate: int, usage: list[int] | None) -> None:
        with self._lock:
            self._running -= 1
            if usage:
                self._tokens.take(usage[0] + usage[1] - estimate, time.monotonic())
                self._totals = [a + b for a, b in zip(self._totals, usage, strict=True)]

    def _emit_failure(self, failure: Failure, call: Call) -> None:
        status, body = error_answer(failure.status, failure.body, self._host, str(failure))
        meta: dict[str, Any] = {"status": status}
        if failure.retry_after_s is not None:
            meta["retry_after_s"] = failure.retry_after_s
        call.emit([self._hidden(body)], meta)

    def _hidden(self, text: bytes) -> bytes:
        return text.replace(self._credential, b"[hidden]") if self._credential else text

    # --- the circuit breaker ---------------------------------------------------------------------------

    def _admit(self) -> None:
        with self._lock:
            wait_s = self._breaker.admit(time.monotonic())
        if wait_s > 0:
            refused = Refused(
                503, f"The upstream {self._host} fails repeatedly. The next attempt is in {wait_s:.0f} s.",
                "server_error", "upstream_unavailable",
            )  # fmt: skip
            refused.retry_after_s = wait_s
            raise refused

    def _count(self, failure: Failure) -> None:
        if failure.status == 0 or failure.status >= 500:
            self._fail()
        else:
            self._succeed()

    def _succeed(self) -> None:
        with self._lock:
            was = self._breaker.state(time.monotonic())
            self._breaker.succeed()
        if was != CLOSED:
            _say(f"upstream {self._host} answers again: the circuit breaker is closed")

    def _abandon(self) -> None:
        with self._lock:
            self._breaker.abandon()

    def _fail(self) -> None:
        with self._lock:
            now = time.monotonic()
            was = self._breaker.state(now)
            self._breaker.fail(now)
            state = self._breaker.state(now)
        if state != was:
            _say(f"upstream {self._host} fails: the circuit breaker is {state}")


class _UpstreamEvents:
    """A reader of an upstream's events for the caller. It only removes the credential."""

    def __init__(self, credential: bytes, host: str) -> None:
        self._credential, self._host = credential, host
        self.usage: list[int] | None = None

    def read(self, event: bytes) -> tuple[list[bytes], dict[str, Any]]:
        """Convert an event of the upstream to events for the caller. Also return the event's facts."""
        return [self._hidden(event)], self._facts(event)

    def whole(self, body: bytes) -> tuple[bytes, dict[str, Any]]:
        """Return the upstream's body for the caller, and its facts. Raise Refused if it is not JSON."""
        try:
            json.loads(body)
        except ValueError:
            text = f"The upstream {self._host} answered with something other than JSON. Check its address."
            raise Refused(502, text, "server_error", "upstream_answer_unknown") from None
        return self._hidden(body), self._facts(body)

    def _facts(self, text: bytes) -> dict[str, Any]:
        if b'"usage"' not in text and b'"error"' not in text:
            return {}
        try:
            document = json.loads(text)
        except ValueError:
            return {}
        if not isinstance(document, dict):
            return {}
        if (status := error_status(document)) is not None:
            return {"status": status}
        self.usage = usage_of(document) or self.usage
        return {"usage": self.usage} if self.usage else {}

    def _hidden(self, text: bytes) -> bytes:
        return text.replace(self._credential, b"[hidden]") if self._credential else text


def estimated_tokens(body: dict[str, Any]) -> int:
    """Estimate the most tokens that a request can use in its prompt and its answer.

    The tokens of the prompt are estimated from the number of bytes. The tokens of the answer are the limit
    that the request sets, or ``DEFAULT_ANSWER`` if it sets none.
    """
    stated = [body.get(name) for name in ("max_completion_tokens", "max_output_tokens", "max_tokens")]
    # Ignore invalid values: the upstream refuses them, and a negative number would raise the limit.
    answer = max((each for each in stated if type(each) is int and each > 0), default=DEFAULT_ANSWER)
    return len(json.dumps(body)) // BYTES_PER_TOKEN + answer


def pause_before_retry(status: int, retry_after_s: float | None, attempt: int) -> float | None:
    """Return the seconds to wait before a retry; None means no retry.

    ``status``: the upstream's HTTP status, or 0 if there was no answer. ``attempt``: the number of attempts
    so far.
    """
    if status not in RETRIED or attempt >= TRIES:
        return None
    if retry_after_s is not None:
        return retry_after_s if retry_after_s <= LONGEST_PAUSE_S else None
    return FIRST_PAUSE_S * 4 ** (attempt - 1) * random.uniform(0.75, 1.25)


def error_answer(status: int, body: bytes, host: str, reason: str) -> tuple[int, bytes]:
    """Return the status and the body that the caller gets for a failure of the upstream."""
    if status == 0:
        refused = Refused(
            502, f"The upstream {host} did not answer: {reason}.", "server_error", "upstream_unavailable"
        )
        return 502, refused.body()
    if 300 <= status < 400:
        # Do not follow a redirect, because this would send the credential to another address.
        text = f"The upstream {host} redirects (status {status}). Deploy with its new address."
        return 502, Refused(502, text, "server_error", "upstream_redirects").body()
    if status in (401, 403):
        # The caller must not see the credential, which is the operator's. The upstream's text may quote a
        # part of it.
        text = f"The upstream {host} refused the credential of this Deployment (status {status})."
        return 502, Refused(502, text, "server_error", "upstream_credential_refused").body()
    try:
        if isinstance(json.loads(body), dict):
            return status, body
    except ValueError:
        pass
    text = body[:500].decode(errors="replace").strip() or "no text"
    return status, Refused(status, f"The upstream {host} answered {status}: {text}", "upstream_error").body()


def _prepared(path: str, body: dict[str, Any], model: str) -> dict[str, Any]:
    body = {**body, "model": model}
    if body.get("stream") and path in ("/v1/chat/completions", "/v1/completions"):
        body["stream_options"] = {**(body.get("stream_options") or {}), "include_usage": True}
    return body


def _sleep(seconds: float, call: Call) -> None:
    until = time.monotonic() + seconds
    while not call.cancelled and (left := until - time.monotonic()) > 0:
        time.sleep(min(left, 0.05))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
