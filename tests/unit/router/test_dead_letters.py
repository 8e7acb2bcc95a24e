"""What is kept of given-up requests, for how long, and their replay."""

from __future__ import annotations

from dataclasses import replace

import orjson
import pytest
from pamqp import commands

from services.router.domain.dead_letters import (
    DeadLetter,
    DeadLetterLimits,
    Replay,
    endpoint_of,
    job_of_letter,
    matching,
    overdue,
    read_letter,
    without_claim,
)
from tidegate.kernel.broker.topology import deployment_of, jobs_queue, requests_queue, suspects_queue
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import read_request

pytestmark = pytest.mark.unit

LETTER = DeadLetter(1.5, "attempts_exhausted", "requests.v1.a", "00ff", 3, 78, "abc", letter="1a")
LIMITS = DeadLetterLimits(max_letters=10, keep_s=100.0, payload_bytes=100)


def letters(*sizes: int, at: float = 0.0) -> list[DeadLetter]:
    """Return letters of these sizes, one per second; 0: without a payload."""
    return [
        replace(LETTER, letter=str(n), at=at + n, payload="key" if size else "", payload_bytes=size)
        for n, size in enumerate(sizes)
    ]


def ids(found: list[DeadLetter]) -> list[str]:
    return [letter.letter for letter in found]


def test_a_line_of_the_journal():
    letter = replace(LETTER, tenant="acme", payload="key", replays=(Replay("0a", "b", 2.0),))
    assert read_letter(orjson.loads(orjson.dumps(letter.to_json()))) == letter


def test_a_line_of_an_earlier_version():
    line = {"at": 1.5, "cause": "c", "queue": "q", "id": "00", "attempt": 1, "size": 7, "trace": ""}
    letter = read_letter(line)
    assert (letter.cause, letter.size, letter.payload) == ("c", 7, "")
    assert letter.letter
    assert letter.missing


def test_a_line_of_a_later_version():
    assert read_letter(LETTER.to_json() | {"mood": "sad"}) == LETTER


def test_the_key_of_its_blob_is_not_shown():
    public = replace(LETTER, payload="0000000060/ab").public()
    assert public["payload"] is True
    assert (public["kind"], public["deployment"]) == ("request", "a")


@pytest.mark.parametrize(
    ("queue", "kind", "deployment"),
    [
        ("requests.v1.digits-v1", "request", "digits-v1"),
        ("jobs.v1.digits-v1.normal", "job", "digits-v1"),
        (requests_queue("a.b_C-v1").name, "request", "a.b_C-v1"),
        (suspects_queue(requests_queue("a.b")).name, "request", "a.b"),
        (jobs_queue("a.b", "high").name, "job", "a.b"),
        ("", "request", ""),
        ("something", "request", ""),
    ],
)
def test_kind_and_deployment_of_a_letter(queue, kind, deployment):
    letter = replace(LETTER, queue=queue)
    assert (letter.kind, letter.deployment) == (kind, deployment)


@pytest.mark.parametrize("name", ["digits-v1", "simple_identity.V2-v1", "a.b.c", "x.suspects", "y.low", "A_"])
def test_every_name_has_queues_of_its_own(name):
    requests = requests_queue(name)
    for queue in (requests, suspects_queue(requests), jobs_queue(name, "low")):
        commands.Queue.Declare(queue=queue.name).validate()
        assert deployment_of(queue.name) == name
    assert requests_queue(f"{name}.suspects").name != suspects_queue(requests).name


def test_nothing_is_overdue_within_the_limits():
    assert overdue(letters(50, 50), 50.0, LIMITS) == ([], [])


def test_the_oldest_of_too_many_are_deleted():
    assert ids(overdue(letters(*[0] * 13), 50.0, LIMITS).letters) == ["0", "1", "2"]


def test_old_letters_are_deleted():
    assert ids(overdue(letters(1, 1, 1), 101.0, LIMITS).letters) == ["0", "1"]


def test_the_oldest_payloads_make_room():
    due = overdue(letters(40, 0, 40, 40, 40), 50.0, LIMITS)
    assert (ids(due.letters), ids(due.payloads)) == ([], ["0", "2"])


def test_the_payload_of_a_deleted_letter_makes_room_too():
    due = overdue(letters(60, 60, 40), 100.5, LIMITS)
    assert (ids(due.letters), ids(due.payloads)) == (["0"], [])


def test_letters_of_a_deployment_and_a_cause():
    found = [LETTER, replace(LETTER, queue="jobs.v1.b.low"), replace(LETTER, cause="undecodable")]
    assert matching(found, None, None) == found
    assert matching(found, "b", None) == found[1:2]
    assert matching(found, "a", "undecodable") == found[2:]


def request(**given) -> envelope.Request:
    frame = envelope.request_frame(
        b"i" * 16, 7, 2, b"key", [b"one", b"second"], tenant=b"acme", trace=b"t", attempt=3, **given
    )
    return read_request(frame)


def test_a_claim_is_replaced_by_its_tensors():
    claimed = request(flags=envelope.RETRY_SAFE | envelope.CLAIM)
    whole = read_request(b"".join(without_claim(claimed, [b"large", b"larger"])))
    assert whole.data == [b"large", b"larger"]
    assert whole.flags == envelope.RETRY_SAFE
    assert whole._replace(data=[], raw=b"", flags=0) == claimed._replace(data=[], raw=b"", flags=0)


def replayed(asked: envelope.Request, **given):
    return job_of_letter(
        LETTER,
        asked,
        **{
            "data": asked.data,
            "id": b"j" * 16,
            "route": {"model": "m", "version": 4, "retry": "safe"},
            "deployment": "b",
            "endpoint": "e",
            "principal": "op",
            "now_ms": 1000,
            "expires_ms": 2000,
            **given,
        },
    )


def test_a_replay_is_a_job_of_its_own():
    """It belongs to the operator, is a first attempt, and follows the rules of its new Deployment."""
    asked = request(flags=envelope.STREAM | 2 << envelope.PRIORITY_SHIFT)
    job = replayed(asked)
    frame = read_request(job.frame)
    assert (frame.id, frame.attempt, frame.deadline_ms, frame.tenant) == (b"j" * 16, 0, 2000, b"op")
    assert (frame.rows, frame.key, frame.data) == (asked.rows, asked.key, asked.data)
    assert frame.flags == envelope.RETRY_SAFE | 2 << envelope.PRIORITY_SHIFT
    assert (job.model, job.version, job.deployment, job.endpoint) == ("m", 4, "b", "e")
    assert (job.principal, job.retry_safe, job.metadata) == ("op", True, {"replay_of": "1a"})


def test_a_replay_on_a_deployment_that_may_not_retry():
    job = replayed(request(), route={"model": "m", "version": 4, "retry": "never"})
    assert job.retry_safe is False
    assert not read_request(job.frame).flags & envelope.RETRY_SAFE


def test_a_replay_by_claim():
    frame = read_request(replayed(request(), data=[b"claim"]).frame)
    assert frame.flags & envelope.CLAIM
    assert frame.data == [b"claim"]


def test_the_endpoint_of_a_deployment():
    endpoints = {"e": {"targets": [{"deployment": "a"}, {"deployment": "b"}]}}
    assert endpoint_of(endpoints, "b", "m") == "e"
    assert endpoint_of(endpoints, "c", "m") == "m"
