"""What an exception of a model call means for each of its requests."""

from __future__ import annotations

import pytest

from services.worker.application.model_calls import decide_failure
from services.worker.domain.backlog import QueuedRequest, UnackedDelivery
from services.worker.domain.split import RowMismatch
from tidegate.kernel.errors import (
    BadRequest,
    DeadlinePassed,
    ModelFailed,
    PayloadTooLarge,
    TidegateError,
    Unavailable,
    UpstreamUnavailable,
)
from tidegate.kernel.protocol import envelope

pytestmark = pytest.mark.unit

UNEXPECTED = "the request could not be run"


def item(number: int, *, safe: bool = True) -> QueuedRequest:
    flags = envelope.RETRY_SAFE if safe else 0
    frame = envelope.request_frame(bytes([number] * 16), 0, 1, b"k", [], flags=flags)
    return QueuedRequest(envelope.read_request(frame), UnackedDelivery(None, 0, "", 1), 0.0)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (BadRequest("no"), BadRequest, "no"),
        (ModelFailed("no"), ModelFailed, "no"),
        (PayloadTooLarge("no"), PayloadTooLarge, "no"),
        (RowMismatch("no"), ModelFailed, "no"),
        (envelope.Undecodable("no"), ModelFailed, "no"),
        (KeyError("no"), ModelFailed, "the request could not be run: KeyError('no')"),
    ],
)
def test_a_request_alone_gets_the_error(error: Exception, kind: type[TidegateError], message: str) -> None:
    one = item(1)
    failure = decide_failure([one], error, UNEXPECTED)
    assert (type(failure.error), failure.error.message) == (kind, message)
    assert (failure.failed, failure.retried, failure.lost, failure.expired) == ([one], (), (), ())


def test_after_a_shared_failure_only_safe_requests_are_retried() -> None:
    safe, unsafe = item(1), item(2, safe=False)
    failure = decide_failure([safe, unsafe], BadRequest("no"), UNEXPECTED)
    assert (failure.failed, failure.retried) == ([unsafe], [safe])
    assert isinstance(failure.error, ModelFailed)
    assert failure.error.message.endswith("this request may not run twice: no")


@pytest.mark.parametrize("around", ["", "Failed to process the request(s) for model 'm', message: "])
def test_an_upstream_that_is_not_available_fails_all_requests(around: str) -> None:
    group = [item(1), item(2)]
    failure = decide_failure(group, ModelFailed(f"{around}UpstreamUnavailable: h is away"), UNEXPECTED)
    assert (type(failure.error), failure.failed, failure.retried) == (UpstreamUnavailable, group, ())
    assert failure.error.message == "the upstream is not available: h is away"


def test_a_callers_text_in_an_error_is_no_unavailable_upstream() -> None:
    group = [item(1), item(2)]
    failure = decide_failure(group, ModelFailed("ValueError: 'UpstreamUnavailable: x'"), UNEXPECTED)
    assert (failure.failed, failure.retried) == ([], group), "the other request is called again alone"


def test_a_lost_model_server_and_a_passed_deadline_apply_to_all_requests() -> None:
    group = [item(1), item(2, safe=False)]
    lost = decide_failure(group, Unavailable("gone"), UNEXPECTED)
    assert (lost.lost, lost.failed, lost.retried, lost.expired) == (group, (), (), ())
    expired = decide_failure(group, DeadlinePassed("late"), UNEXPECTED)
    assert (expired.expired, expired.failed, expired.retried, expired.lost) == (group, (), (), ())
