from collections import Counter
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.domain.traffic_split import (
    BLOCK,
    Origin,
    Sticky,
    TrafficRule,
    TrafficSplitter,
    stay,
)
from tests.unit.gateway.test_routing import table

NAMES = ("a", "b", "c")


def origin(headers=MappingProxyType({}), principal="key-1", parameters=MappingProxyType({})):
    return Origin(headers, principal, lambda: parameters)


@pytest.mark.parametrize("weights", [(90, 9, 1), (900, 90, 10), (0, 99, 1)])
def test_weights_are_exact_in_every_block(weights):
    splitter, total = TrafficSplitter(seed=5), sum(weights)
    for _ in range(50):
        seen = Counter(splitter.draw("e", NAMES, weights) for _ in range(BLOCK))
        assert [seen[i] for i in range(3)] == [BLOCK * weight // total for weight in weights]


@given(st.lists(st.integers(0, 1000), min_size=3, max_size=3).filter(any), st.integers(0, 2**32))
def test_fractions_go_to_later_blocks(weights, seed):
    splitter, total, draws = TrafficSplitter(seed), sum(weights), 10 * BLOCK
    seen = Counter(splitter.draw("e", NAMES, tuple(weights)) for _ in range(draws))
    for index, weight in enumerate(weights):
        assert abs(seen[index] - draws * weight / total) < 2


def test_the_order_within_a_block_is_random_and_depends_on_the_seed():
    def block(seed):
        splitter = TrafficSplitter(seed)
        return [splitter.draw("e", NAMES, (50, 30, 20)) for _ in range(BLOCK)]

    assert block(1) == block(1)
    assert block(1) != block(2)
    assert block(1) != sorted(block(1))


def test_changed_weights_count_at_once():
    splitter = TrafficSplitter(seed=3)
    splitter.draw("e", NAMES, (100, 0, 0))
    assert {splitter.draw("e", NAMES, (0, 100, 0)) for _ in range(BLOCK)} == {1}


def test_a_sticky_key_moves_only_if_it_must():
    keys = [b"%d" % n for n in range(5000)]
    before = [stay(key, NAMES, (50, 30, 20)) for key in keys]
    shares = Counter(before)
    assert abs(shares[0] / 5000 - 0.5) < 0.03
    assert abs(shares[2] / 5000 - 0.2) < 0.03
    more = [stay(key, NAMES, (50, 30, 40)) for key in keys]
    assert all(b in (a, 2) for a, b in zip(before, more, strict=True)), "keys move only to the larger weight"
    gone = [stay(key, NAMES, (50, 30, 0)) for key in keys]
    assert all(b == a for a, b in zip(before, gone, strict=True) if a != 2)


@given(
    st.lists(st.integers(0, 1000), min_size=3, max_size=3).filter(any),
    st.integers(0, 2),
    st.integers(0, 1000),
    st.lists(st.binary(min_size=1, max_size=20), min_size=1, max_size=20),
)
def test_a_changed_weight_moves_keys_only_to_or_from_its_own_target(weights, changed, weight, keys):
    after = [weight if index == changed else each for index, each in enumerate(weights)]
    if not any(after):
        return
    for key in keys:
        old, new = stay(key, NAMES, weights), stay(key, NAMES, after)
        assert old == new or (new == changed if weight > weights[changed] else old == changed)


def test_a_sticky_header_decides_and_without_it_the_weights_do():
    compiled = table([50, 50], sticky={"by": "header", "name": "X-User"})
    splitter = TrafficSplitter(seed=1)

    def pick(headers):
        return compiled.pick("digits", "", splitter, lambda: origin(headers))[1].name

    assert len({pick({b"x-user": b"ada"}) for _ in range(50)}) == 1
    assert len({pick({b"x-user": b"%d" % n}) for n in range(50)}) == 2
    assert Counter(pick({}) for _ in range(100)) == {"digits-v1": 50, "digits-v2": 50}


@pytest.mark.parametrize(
    ("by", "name", "first", "second"),
    [
        ("key", "", origin(principal="key-7"), origin(principal="key-7")),
        ("parameter", "user", origin(parameters={"user": 7}), origin(parameters={"user": "7"})),
    ],
)
def test_keys_and_parameters_are_sticky(by, name, first, second):
    sticky = Sticky(by, name)
    assert sticky.key(first) == sticky.key(second) is not None
    assert Sticky("parameter", "absent").key(first) is None


@pytest.mark.parametrize(
    ("rule", "headers", "principal", "applies"),
    [
        (TrafficRule(b"x-beta", None, None), {b"x-beta": b"1"}, "k", True),
        (TrafficRule(b"x-beta", None, None), {}, "k", False),
        (TrafficRule(b"x-beta", b"yes", None), {b"x-beta": b"yes"}, "k", True),
        (TrafficRule(b"x-beta", b"yes", None), {b"x-beta": b"no"}, "k", False),
        (TrafficRule(None, None, "k"), {}, "k", True),
        (TrafficRule(None, None, "k"), {}, "other", False),
        (TrafficRule(b"x-beta", None, "k"), {}, "k", False),
    ],
)
def test_rules(rule, headers, principal, applies):
    assert rule.matches(origin(headers, principal)) is applies


def test_rules_come_before_weights_and_a_version_before_all():
    compiled = table([100, 0], rules=[{"header": "X-Beta", "deployment": "digits-v2"}])
    splitter = TrafficSplitter()
    beta = {b"x-beta": b"1"}
    assert compiled.pick("digits", "", splitter, lambda: origin(beta))[1].name == "digits-v2"
    assert compiled.pick("digits", "", splitter, lambda: origin())[1].name == "digits-v1"
    assert compiled.pick("digits", "1", splitter, lambda: origin(beta))[1].name == "digits-v1"


def test_a_rule_for_a_deployment_that_is_gone_is_skipped():
    compiled = table([100], rules=[{"tenant": "key-1", "deployment": "gone"}])
    assert compiled.pick("digits", "", TrafficSplitter(), lambda: origin())[1].name == "digits-v1"
