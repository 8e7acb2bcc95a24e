"""The errors for callers of given-up requests."""

from __future__ import annotations

import pytest

from services.router.domain.exceptions import (
    EXHAUSTED,
    NOT_RETRIED,
    UNDECODABLE,
    caller_error,
)
from services.worker.domain import retry_after_loss
from tidegate.kernel.errors import BY_REASON

pytestmark = pytest.mark.unit


def test_router_and_worker_use_the_same_causes():
    assert (
        {retry_after_loss.EXHAUSTED, retry_after_loss.NOT_RETRIED}
        == {EXHAUSTED, NOT_RETRIED}
        == retry_after_loss.GIVE_UP
    )
    assert retry_after_loss.UNDECODABLE == UNDECODABLE


@pytest.mark.parametrize("cause", [EXHAUSTED, NOT_RETRIED])
def test_the_model_is_at_fault(cause):
    error = caller_error(cause)
    assert error is not None
    assert error.reason == "model_failed"
    assert error.reason in BY_REASON


def test_an_undecodable_message_has_no_caller():
    assert caller_error(UNDECODABLE) is None


def test_an_unknown_cause_is_part_of_the_message():
    error = caller_error("out of tea")
    assert error is not None
    assert (error.reason, error.message) == ("unavailable", "the request could not be handled: out of tea")
