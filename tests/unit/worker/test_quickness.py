"""Which models' calls are too short to be cancelled."""

from services.worker.domain.call_duration import SLOW_LIMITS, Quickness


def calls_until_quick(quickness: Quickness) -> int:
    for count in range(1000):
        if quickness.quick:
            return count
        quickness.answered(0.001)
    raise AssertionError("never")


def test_nothing_is_quick_before_it_was_measured():
    quickness = Quickness(0.01)
    assert not quickness.quick
    quickness.answered(0.009)
    assert quickness.quick


def test_the_mean_decides_and_a_very_long_call_counts_at_once():
    quickness = Quickness(0.01)
    for spent_s in (0.001, 0.02, 0.001, 0.04, 0.001):
        quickness.answered(spent_s)
        assert quickness.quick
    quickness.answered(SLOW_LIMITS * 0.01)
    assert not quickness.quick
    assert 20 < calls_until_quick(quickness) < 50


def test_a_call_that_was_given_up_counts_as_slow():
    quickness = Quickness(0.01)
    quickness.answered(0.001)
    quickness.given_up(0.001)
    assert not quickness.quick
    assert calls_until_quick(quickness) > 20


def test_the_slower_the_call_the_longer_it_is_remembered():
    quickness, slower = Quickness(0.01), Quickness(0.01)
    quickness.answered(0.1)
    slower.answered(10.0)
    assert calls_until_quick(quickness) < calls_until_quick(slower)


def test_rejected_calls_count_only_if_they_are_slow():
    quickness = Quickness(0.01)
    for _ in range(1000):
        quickness.refused(0.0005)
    assert not quickness.quick, "nothing has run yet"
    quickness.answered(30.0)
    for _ in range(1000):
        quickness.refused(0.0005)
    assert not quickness.quick, "a thousand refusals are no quick call"
    quickness = Quickness(0.01)
    quickness.answered(0.001)
    quickness.refused(0.001)
    assert quickness.quick
    quickness.refused(SLOW_LIMITS * 0.01)
    assert not quickness.quick, "it failed late"
