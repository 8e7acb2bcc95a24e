"""What is sent again and what is not, on a clock that the test turns."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from tidegate.client.errors import Unreachable
from tidegate.client.flow import Answer, Caller, Send, Sleep
from tidegate.kernel import errors


class Server:
    """Drives a flow: gives the scripted replies and lets the clock run while it sleeps."""

    def __init__(self, *replies: Answer | errors.TidegateError, retries: int = 2) -> None:
        self.now = 100.0
        self.sent: list[Send] = []
        self.slept: list[float] = []
        self._replies = list(replies)
        self.caller = Caller(retries, clock=lambda: self.now, chance=lambda: 0.5)

    def run(self, timeout_s: float = 10.0) -> Any:
        return self.drive(self.caller.call("POST", "/x", timeout_s=timeout_s))

    def drive(self, flow: Any) -> Any:
        try:
            step = next(flow)
            while True:
                if isinstance(step, Sleep):
                    self.slept.append(step.seconds)
                    self.now += step.seconds
                    step = flow.send(None)
                    continue
                assert isinstance(step, Send)
                self.sent.append(step)
                reply = self._replies.pop(0)
                step = flow.send(reply) if isinstance(reply, Answer) else flow.throw(reply)
        except StopIteration as done:
            return done.value


def refusal(status: int, reason: str, retry_after: str | None = None) -> Answer:
    headers = {} if retry_after is None else {"retry-after": retry_after}
    return Answer(status, headers, orjson.dumps({"error": "no", "reason": reason, "request_id": "r1"}))


OK = Answer(200, {}, b"{}")


def test_an_answer_is_returned() -> None:
    server = Server(OK)
    assert server.run() is OK
    assert server.sent[0].headers["X-Request-Timeout-Ms"] == "10000"


def test_broken_connections_are_tried_again_after_growing_pauses() -> None:
    server = Server(Unreachable("gone"), Unreachable("gone"), OK)
    assert server.run() is OK
    assert server.slept == pytest.approx([0.075, 0.15])


def test_retries_end() -> None:
    server = Server(*[Unreachable("gone")] * 3)
    with pytest.raises(Unreachable):
        server.run()
    assert len(server.sent) == 3


def test_no_retries_when_none_are_wanted() -> None:
    server = Server(Unreachable("gone"), retries=0)
    with pytest.raises(Unreachable):
        server.run()


@pytest.mark.parametrize(("status", "reason"), [(503, "overloaded"), (429, "too_many_requests")])
def test_what_says_when_to_come_back_is_tried_again(status: int, reason: str) -> None:
    server = Server(refusal(status, reason, "2"), OK)
    assert server.run() is OK
    assert server.slept == [2.25]
    assert server.sent[1].headers["X-Request-Timeout-Ms"] == "7750"


def test_a_quota_that_is_used_up_for_today_is_raised_at_once() -> None:
    server = Server(refusal(429, "too_many_requests", "40000"))
    with pytest.raises(errors.TooMany) as caught:
        server.run()
    assert caught.value.retry_after_s == 40000
    assert server.slept == []


def test_a_rate_limit_is_raised_at_once_without_retries() -> None:
    server = Server(refusal(429, "too_many_requests", "1"), retries=0)
    with pytest.raises(errors.TooMany):
        server.run()


def test_what_may_not_be_repeated_is_sent_again_only_after_a_refusal() -> None:
    server = Server(refusal(429, "too_many_requests", "1"), Unreachable("broken"), OK)
    flow = server.caller.call("POST", "/x", timeout_s=9, repeatable=False)
    with pytest.raises(Unreachable):
        server.drive(flow)
    assert len(server.sent) == 2


def test_a_503_whose_time_is_after_the_deadline_is_raised_at_once() -> None:
    server = Server(refusal(503, "overloaded", "60"))
    with pytest.raises(errors.Overloaded) as caught:
        server.run()
    assert caught.value.retry_after_s == 60
    assert server.slept == []


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (refusal(503, "unavailable"), errors.Unavailable),
        (refusal(500, "model_failed"), errors.ModelFailed),
        (refusal(504, "deadline_passed", "1"), errors.DeadlinePassed),
        (refusal(500, "internal", "1"), errors.TidegateError),
        (refusal(400, "bad_request", "1"), errors.BadRequest),
    ],
)
def test_everything_else_is_never_sent_twice(answer: Answer, expected: type[Exception]) -> None:
    server = Server(answer)
    with pytest.raises(expected):
        server.run()
    assert len(server.sent) == 1


def test_a_missed_deadline_is_not_tried_again() -> None:
    server = Server(errors.DeadlinePassed("late"))
    with pytest.raises(errors.DeadlinePassed):
        server.run()
    assert len(server.sent) == 1


def test_the_timeout_sent_is_within_what_a_gateway_takes() -> None:
    server = Server(OK)
    server.run(timeout_s=1e9)
    assert server.sent[0].headers["X-Request-Timeout-Ms"] == "86400000"
