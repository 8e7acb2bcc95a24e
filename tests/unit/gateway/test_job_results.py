"""The stored form of a job's answer, and the errors of jobs without a result."""

from __future__ import annotations

import orjson
import pytest

from services.gateway.application.jobs.backlog import estimated_start_ms
from services.gateway.domain.contract import Decoded, WantedOutput
from services.gateway.domain.job_results import answer_form, failure_of, prefers_binary, read_answer_form
from services.gateway.domain.replica_fleet import ReplicaFleet
from tidegate.kernel.errors import Conflict, DeadlinePassed, ModelFailed, NotFound
from tidegate.kernel.protocol.jobs import Job

pytestmark = pytest.mark.unit


def job(state, error=None):
    return Job(
        id=bytes(16),
        state=state,
        attempt=1,
        model="m",
        endpoint="m",
        deployment="m-v1",
        version=1,
        principal="p",
        level="normal",
        created_ms=1,
        expires_ms=2,
        error=error,
    )


@pytest.mark.parametrize(
    "request_",
    [
        Decoded("", 1, b"k", [b"d"], None, False),
        Decoded("mine", 0, b"k", [], None, True),
        Decoded("", 1, b"k", [], (WantedOutput("a", True), WantedOutput("b", False, 3)), False),
    ],
)
def test_the_answer_form_survives_the_store(request_):
    found = read_answer_form(orjson.loads(orjson.dumps(answer_form(request_))))
    assert (found.id, found.wanted, found.binary) == (request_.id, request_.wanted, request_.binary)


def test_defaults_are_not_stored():
    assert answer_form(Decoded("", 1, b"k", [b"d"], None, False)) == {}


def test_another_form_than_the_requested_one():
    ask = answer_form(Decoded("", 1, b"k", [], (WantedOutput("a", True), WantedOutput("b", False, 3)), False))
    as_json = read_answer_form(ask, binary=False)
    assert as_json.wanted == (WantedOutput("a", False), WantedOutput("b", False, 3))
    assert read_answer_form({}, binary=True).binary


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        (None, None),
        (b"*/*", None),
        (b"text/html, */*;q=0.8", None),
        (b"application/json", False),
        (b"application/json, */*", None),
        (b"Application/Octet-Stream", True),
    ],
)
def test_the_form_by_accept(accept, expected):
    assert prefers_binary(accept) is expected


def test_the_error_of_a_job_without_a_result():
    cancelled = failure_of(job("cancelled"))
    assert (type(cancelled), cancelled.reason) == (Conflict, "cancelled")
    expired = failure_of(job("expired"))
    assert (type(expired), expired.reason) == (DeadlinePassed, "expired")
    lost = failure_of(job("failed", {"reason": "worker_lost", "message": "gone"}))
    assert (type(lost), lost.reason, lost.message) == (ModelFailed, "worker_lost", "gone")
    known = failure_of(job("failed", {"reason": "not_found", "message": "no"}))
    assert type(known) is NotFound


def test_the_estimated_start_of_a_job():
    assert estimated_start_ms(10, ReplicaFleet(ready=2, full_ms=4.0)) == 20.0
    assert estimated_start_ms(10, ReplicaFleet(ready=2)) is None
    assert estimated_start_ms(10, ReplicaFleet(start_ms=700.0)) == 700.0
    assert estimated_start_ms(10, ReplicaFleet()) is None
