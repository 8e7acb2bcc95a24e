"""Ids of answers, and the reading of feedback."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.application.feedback import FeedbackTags
from services.gateway.domain.feedback_ids import AnswerFacts, FeedbackIds
from services.gateway.domain.feedback_items import Outcome, read_item
from services.gateway.domain.traffic_split import Origin
from tests.unit.gateway.test_routing import table
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.access import Principal

pytestmark = pytest.mark.unit

FACTS = AnswerFacts("digits", "digits-v2", "2", "my-id", 1_700_000_000_000_000, True, "ab", "cd")
NOW = 1_700_000_000_000
CALLER = Principal("k1", "app", frozenset({"infer"}))


def test_an_id_states_its_facts():
    ids = FeedbackIds("secret")
    assert ids.read(ids.make(FACTS).decode()) == FACTS
    assert FeedbackIds("secret").read(ids.make(FACTS).decode()) == FACTS
    assert FeedbackIds("other").read(ids.make(FACTS).decode()) is None


@given(st.integers(0, 10_000), st.characters(codec="ascii"))
def test_a_changed_id_is_refused(at, character):
    ids = FeedbackIds("secret")
    made = ids.make(FACTS).decode()
    at %= len(made) - 1
    changed = made[:at] + character + made[at + 1 :]
    assert changed == made or ids.read(changed) in (None, FACTS)
    assert changed[:4] == made[:4] or ids.read(changed) is None


@pytest.mark.fuzz
@given(st.text(max_size=300))
def test_any_text_is_read_without_an_error(text):
    assert FeedbackIds("secret").read(text) is None
    assert FeedbackIds("secret").read(f"fb1.{text}") is None


def test_hashes_hide_caller_and_key():
    ids = FeedbackIds("secret")
    assert ids.owner("k1") != ids.owner("k2")
    assert ids.owner("k1") != ids.unit(b"k1")
    assert "k1" not in ids.make(FACTS).decode()


def tags(**endpoint: Any) -> tuple[FeedbackTags, FeedbackIds]:
    ids = FeedbackIds("secret")
    found = FeedbackTags(ids)
    found.take(table([50, 50], **endpoint))
    return found, ids


def facts(found: FeedbackTags, ids: FeedbackIds, version: str = "", user: bytes = b"") -> AnswerFacts:
    headers = {b"x-user": user} if user else {}
    route = table([50, 50]).endpoints["digits"].targets[1]
    pending = found.begin("digits", version, lambda: Origin(headers, "k1", dict), b"rid", CALLER)
    assert pending is not None
    read = ids.read(pending.id(route).decode())
    assert read is not None
    return read


def test_an_endpoint_without_feedback_has_no_ids():
    found, _ = tags()
    assert not found.endpoints
    assert found.begin("digits", "", lambda: Origin({}, "k1", dict), b"rid", CALLER) is None


def test_only_random_choices_are_assigned():
    rules = [{"header": "X-User", "value": "me", "tenant": None, "deployment": "digits-v1"}]
    found, ids = tags(feedback=True, sticky={"by": "header", "name": "X-User"}, rules=rules)
    first = facts(found, ids)
    assert (first.endpoint, first.deployment, first.request_id) == ("digits", "digits-v2", "rid")
    assert (first.assigned, first.unit) == (True, "")
    assert facts(found, ids, user=b"you").unit == facts(found, ids, user=b"you").unit != ""
    assert not facts(found, ids, user=b"me").assigned
    assert not facts(found, ids, version="2").assigned


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        ({"score": 0.5}, (Outcome("score", 0.5, None),)),
        ({"score": 1, "reward": -2.5}, (Outcome("score", 1.0, None), Outcome("reward", -2.5, None))),
        ({"label": "cat"}, (Outcome("label", None, "cat"),)),
        ({"label": True}, (Outcome("label", None, "true"),)),
        ({"label": 7}, (Outcome("label", None, "7"),)),
        ({"metric": "clicks", "value": 3}, (Outcome("clicks", 3.0, None),)),
        ({"metric": "class", "value": "dog"}, (Outcome("class", None, "dog"),)),
        ({"metric": "bought", "value": True}, (Outcome("bought", 1.0, None),)),
    ],
)
def test_outcomes(given_, expected):
    item = read_item({"request_id": "fb1.x", **given_}, NOW)
    assert item.outcomes == expected
    assert item.at == NOW


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        ([], "must be a JSON object"),
        (None, "must be a JSON object"),
        ({"request_id": "x"}, "needs score, label, reward"),
        ({"score": 1}, "needs request_id"),
        ({"request_id": "x", "idempotency_key": "y", "score": 1}, "not both"),
        ({"request_id": 5, "score": 1}, "request_id must be a string"),
        ({"request_id": "x", "score": "good"}, "score must be a finite number"),
        ({"request_id": "x", "score": float("nan")}, "score must be a finite number"),
        ({"request_id": "x", "score": 1e101}, "number from -1e\\+100 to 1e\\+100"),
        ({"request_id": "x", "reward": -(10**400)}, "reward must be a finite number"),
        ({"request_id": "x", "label": ["a"]}, "label must be a string"),
        ({"request_id": "x", "label": "a" * 257}, "label must be a string"),
        ({"request_id": "x", "metric": "1a", "value": 1}, "begins with a letter"),
        ({"request_id": "x", "metric": "a"}, "belong together"),
        ({"request_id": "x", "value": 1}, "belong together"),
        ({"request_id": "x", "metric": "score", "value": 1, "score": 2}, "'score' twice"),
        ({"request_id": "x", "stars": 5}, "no member 'stars'"),
        ({"request_id": "x", "score": 1, "at": "soon"}, "ISO 8601"),
        ({"request_id": "x", "score": 1, "at": NOW / 1e3 + 3600}, "not in the future"),
    ],
)
def test_wrong_feedback_is_refused_with_the_reason(raw, problem):
    with pytest.raises(BadRequest, match=problem):
        read_item(raw, NOW)


def test_the_time_of_an_outcome():
    assert read_item({"request_id": "x", "score": 1, "at": 1_600_000_000.5}, NOW).at == 1_600_000_000_500
    assert (
        read_item({"request_id": "x", "score": 1, "at": "2020-09-13T12:26:40Z"}, NOW).at == 1_600_000_000_000
    )


@pytest.mark.fuzz
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda x: (
            st.lists(x)
            | st.dictionaries(
                st.sampled_from(
                    ["request_id", "idempotency_key", "score", "label", "metric", "value", "at", "x"]
                ),
                x,
            )
        ),
    )
)
def test_any_json_is_read_or_refused(raw):
    with suppress(BadRequest):
        assert read_item(raw, NOW).outcomes
