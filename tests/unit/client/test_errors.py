"""Which error an answer stands for."""

from __future__ import annotations

import httpx
import orjson
import pytest

from tidegate.client.errors import BadAnswer, from_answer, request_id_of
from tidegate.kernel import errors


@pytest.mark.parametrize("reason", sorted(errors.BY_REASON))
def test_the_reason_decides(reason: str) -> None:
    error = from_answer(418, {}, orjson.dumps({"error": "Why.", "reason": reason, "request_id": "abc"}))
    assert type(error) is errors.BY_REASON[reason]
    assert error.message == "Why."
    assert request_id_of(error) == "abc"


def test_a_new_reason_falls_back_to_the_status_and_is_kept() -> None:
    error = from_answer(503, {}, orjson.dumps({"error": "x", "reason": "store_unavailable"}))
    assert type(error) is errors.Unavailable
    assert error.reason == "store_unavailable"


def test_an_answer_of_somebody_else() -> None:
    headers = httpx.Headers({"Retry-After": "3", "X-Request-Id": "q"})
    error = from_answer(502, headers, b"bad gateway\n")
    assert isinstance(error, errors.Unavailable)
    assert error.message == "bad gateway"
    assert error.retry_after_s == 3
    assert request_id_of(error) == "q"


@pytest.mark.parametrize(("status", "kind"), [(404, BadAnswer), (502, errors.Unavailable)])
def test_a_web_page_is_not_recited(status: int, kind: type[errors.TidegateError]) -> None:
    error = from_answer(status, {}, b"\n<!DOCTYPE html><p>nginx")
    assert type(error) is kind
    assert "web page" in error.message
    assert "nginx" not in error.message


@pytest.mark.parametrize("body", [b"", b"[]", b'{"detail": ""}'])
def test_an_answer_without_a_reason_says_so(body: bytes) -> None:
    error = from_answer(404, {"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, body)
    assert isinstance(error, errors.NotFound)
    assert error.message
    assert error.retry_after_s is None
    assert request_id_of(error) is None
