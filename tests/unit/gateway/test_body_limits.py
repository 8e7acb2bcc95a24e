"""Limits of bodies while they arrive."""

from __future__ import annotations

import pytest

from services.gateway.api.body_limits import STEP, Body, BodyLimits
from services.gateway.domain.memory_budget import SMALL, MemoryBudget
from tidegate.kernel.errors import Overloaded, PayloadTooLarge

pytestmark = pytest.mark.unit

MIB = 2**20


def limits(body: int = 4 * MIB, inflight: int = 8 * MIB) -> BodyLimits:
    return BodyLimits(
        body_bytes=body, json_bytes=MIB, bodies=MemoryBudget(inflight), answers=MemoryBudget(inflight)
    )


def test_a_budget_counts():
    budget = MemoryBudget(100)
    assert budget.take(60)
    assert not budget.take(41)
    assert budget.take(27)
    budget.release(87)
    assert budget.used == 0


def test_the_last_part_is_reserved_for_small_bodies():
    budget = MemoryBudget(8 * SMALL)
    assert budget.take(SMALL * 7)
    assert not budget.take(1, of=SMALL + 1)
    assert not budget.room(SMALL + 1)
    assert budget.room(SMALL)
    assert budget.take(SMALL)
    assert not budget.take(1)


@pytest.mark.parametrize(
    ("declared", "refusal"),
    [
        (b"10", None),
        (b"%d" % (4 * MIB), None),
        (b"%d" % (4 * MIB + 1), PayloadTooLarge),
        (b"%d  " % (4 * MIB + 1), PayloadTooLarge),
        (b"x", None),
    ],
)
def test_a_large_body_is_refused_at_its_head(declared, refusal):
    found = limits().check_headers({b"content-length": declared})
    assert type(found) is (refusal or type(None))


def test_a_request_without_memory_is_refused_by_its_headers():
    found = limits()
    found.bodies.force(5 * MIB)
    refusal = found.check_headers({b"content-length": b"%d" % (3 * MIB)})
    assert isinstance(refusal, Overloaded)
    assert refusal.retry_after_s == 1.0
    assert found.check_headers({b"content-length": b"10"}) is None
    found.answers.force(9 * MIB)
    assert isinstance(found.check_headers({}), Overloaded), "answers that nobody reads fill the memory too"


def test_a_body_in_chunks():
    found = limits()
    body = Body(found)
    for chunk in (b"ab", b"cd", b"ef"):
        assert body.add(chunk) is None
    assert (len(body), found.bodies.used) == (6, 6)
    assert bytes(body.whole()) == b"abcdef"
    assert found.bodies.used == 6, "until it is answered"
    body.release()
    body.release()
    assert found.bodies.used == 0


def test_one_chunk_is_not_copied():
    chunk, body = b"x" * 100, Body(limits())
    body.add(chunk)
    assert body.whole() is chunk


def test_a_body_that_does_not_end():
    found = limits()
    body = Body(found)
    refusals = [refusal for _ in range(6) if (refusal := body.add(bytes(MIB)))]
    assert [type(refusal) for refusal in refusals] == [PayloadTooLarge] * 2
    body.release()
    assert found.bodies.used == 0


def test_many_bodies_have_a_bound():
    found = limits()
    bodies = [Body(found) for _ in range(20)]
    taken = sum(body.add(bytes(MIB)) is None for body in bodies)
    assert taken == 8
    assert isinstance(bodies[-1].add(bytes(10)), Overloaded)


def test_in_place():
    found = limits()
    body, right = Body(found), bytes(range(256)) * (3 * MIB // 256)
    body.add(right[:1000])
    assert body.expect(len(right)) is None
    while not body.complete:
        window = body.window()
        assert len(window) <= STEP
        count = min(len(window), 100_000)
        at = len(body)
        window[:count] = right[at : at + count]
        window.release()
        assert body.took(count) is None
    assert body.whole() == right
    assert found.bodies.used == len(right)


def test_memory_grows_with_bytes_received():
    found = limits()
    body = Body(found)
    body.expect(4 * MIB)
    assert len(body.window()) == STEP
    assert found.bodies.used == STEP


def test_in_place_without_room():
    found = limits(inflight=2 * MIB)
    body = Body(found)
    assert body.expect(3 * MIB) is None
    body.window().release()
    assert isinstance(body.took(STEP), Overloaded)


def test_json_has_a_limit_of_its_own():
    limits().check_json(MIB)
    with pytest.raises(PayloadTooLarge, match="send large tensors as binary data"):
        limits().check_json(MIB + 1)
