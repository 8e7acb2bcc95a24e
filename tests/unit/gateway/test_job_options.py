"""Options of jobs: valid ones, and refusals of the others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.domain.job_options import (
    MAX_WAIT_S,
    JobOptions,
    check_key,
    from_fields,
    from_headers,
    preference,
)
from tidegate.kernel.errors import BadRequest

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("header", "wait_s"),
    [
        (b"respond-async", 0),
        (b"Respond-Async", 0),
        (b"wait=5", 5),
        (b'wait="5"', 5),
        (b"respond-async, wait=10", 10),
        (b"respond-async;wait=10", 10),
        (b"handling=lenient, wait = 3", 3),
        (b"wait=99999999", MAX_WAIT_S),
        (b"wait=0", 0),
    ],
)
def test_headers_that_make_a_job(header, wait_s):
    found = preference(header)
    assert found is not None
    assert found.wait_s == wait_s


@pytest.mark.parametrize(
    "header", [None, b"", b"handling=strict", b"return=minimal", b"wait", b"wait=soon", b"awaiting=5"]
)
def test_headers_that_make_no_job(header):
    assert preference(header) is None


@given(st.binary(max_size=64))
def test_any_header_is_read(header):
    preference(header)


def test_the_applied_preference():
    applied = {
        header: found.applied
        for header in (b"respond-async", b"respond-async, wait=7")
        if (found := preference(header)) is not None
    }
    assert applied == {b"respond-async": b"respond-async", b"respond-async, wait=7": b"wait=7"}


def test_options_in_headers():
    assert from_headers({b"accept": b"*/*"}) == JobOptions()
    found = from_headers(
        {b"x-job-priority": b"high", b"x-job-ttl": b"2.5", b"x-job-webhook": b"https://example.org/a?b=c"}
    )
    assert found == JobOptions("high", 2.5, "https://example.org/a?b=c")


def test_options_in_a_body_override_those_in_headers():
    base = JobOptions("high", 5.0, "https://a.example/")
    assert from_fields({}, base) == base
    assert from_fields({"priority": None, "ttl_s": 7, "metadata": {"a": [1]}}, base) == JobOptions(
        "high", 7.0, "https://a.example/", {"a": [1]}
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"priority": "urgent"},
        {"priority": 1},
        {"priority": ["high"]},
        {"ttl_s": 0.5},
        {"ttl_s": True},
        {"ttl_s": "60"},
        {"ttl_s": 31 * 86_400},
        {"ttl_s": float("nan")},
        {"webhook": 5},
        {"webhook": "example.org"},
        {"webhook": "https://user@example.org/"},
        {"webhook": "https://example.org/" + "x" * 3000},
        {"metadata": "x"},
        {"metadata": {"x": "y" * 5000}},
    ],
)
def test_wrong_fields(fields):
    with pytest.raises(BadRequest):
        from_fields(fields)


@pytest.mark.parametrize("headers", [{b"x-job-ttl": b"soon"}, {b"x-job-priority": b"urgent"}])
def test_wrong_headers(headers):
    with pytest.raises(BadRequest):
        from_headers(headers)


def test_keys():
    assert check_key(None) is None
    assert check_key(b'"8e03978e-40d5-43dd-bc93-6894a57f9324"') == '"8e03978e-40d5-43dd-bc93-6894a57f9324"'
    for wrong in (b"", b"a b", b"\xff", b"x" * 256, b"a\nb"):
        with pytest.raises(BadRequest):
            check_key(wrong)
