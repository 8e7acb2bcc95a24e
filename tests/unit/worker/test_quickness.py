"""Which models' calls are taken for too short to be cancelled."""

from services.worker.domain.pace import SLOW_LIMITS, Quickness


def calls_until_quick(quickness: Quickness) -> int:
    for count in range(1000):
        if quickness.quick:
            return count
        quickness.took(0.001, whole=True)
    raise AssertionError("never")


def test_nothing_is_quick_before_it_was_measured():
    quickness = Quickness(0.01)
    assert not quickness.quick
    quickness.took(0.009, whole=True)
    assert quickness.quick


def test_the_mean_decides_and_a_call_of_many_times_the_limit_at_once():
    quickness = Quickness(0.01)
    for spent_s in (0.001, 0.02, 0.001, 0.04, 0.001):
        quickness.took(spent_s, whole=True)
        assert quickness.quick
    quickness.took(SLOW_LIMITS * 0.01, whole=True)
    assert not quickness.quick
    assert 20 < calls_until_quick(quickness) < 50


def test_one_that_was_given_up_was_slow_however_soon_that_was():
    quickness = Quickness(0.01)
    quickness.took(0.001, whole=True)
    quickness.took(0.001, whole=False)
    assert not quickness.quick
    assert calls_until_quick(quickness) > 20


def test_the_slower_the_call_the_longer_it_is_remembered():
    quickness, slower = Quickness(0.01), Quickness(0.01)
    quickness.took(0.1, whole=True)
    slower.took(10.0, whole=True)
    assert calls_until_quick(quickness) < calls_until_quick(slower)
