"""Rules, sticky keys and the table of targets of ``tidegate traffic``: the pure parts."""

from __future__ import annotations

import pytest

from tidegate.cli.exit_codes import UsageError
from tidegate.cli.options import parse_sticky
from tidegate.cli.traffic import parse_rule, rows

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("header:X-Beta:v2", {"header": "X-Beta", "value": None, "deployment": "v2"}),
        ("header:X-Beta=1:v2", {"header": "X-Beta", "value": "1", "deployment": "v2"}),
        ("header:X-Id=a:b:v2", {"header": "X-Id", "value": "a:b", "deployment": "v2"}),
        ("tenant:key-7:digits-v2", {"tenant": "key-7", "deployment": "digits-v2"}),
    ],
)
def test_rules(text: str, rule: dict[str, str]) -> None:
    assert parse_rule(text) == rule


@pytest.mark.parametrize("text", ["", "v2", "header:v2", "header:X-Beta:", "cookie:a:v2", "tenant:v2"])
def test_rules_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="write header:NAME:VERSION"):
        parse_rule(text)


def test_sticky_sources() -> None:
    assert parse_sticky("header:X-User") == {"by": "header", "name": "X-User"}
    assert parse_sticky("key") == {"by": "key", "name": None}
    assert parse_sticky("none") is None
    for wrong in ("header", "key:x", "cookie:x"):
        with pytest.raises(UsageError, match="write header:NAME"):
            parse_sticky(wrong)


def test_each_target_says_why_its_share_differs() -> None:
    endpoint = {
        "targets": [
            {"deployment": "a", "weight": 90},
            {"deployment": "b", "weight": 10},
        ],
        "rules": [{"deployment": "c"}],
    }
    entry = {"targets": [{"deployment": "a", "weight": 90}], "withheld": {"b": "it is paused"}}
    deployments = {"a": {"version": 1, "ready": 2}, "b": {"version": 2, "ready": 0}}
    found = rows(endpoint, entry, deployments, {"a": {"arrival_rate": 5.0}})
    assert [(each["deployment"], each["share"], each["now"]) for each in found] == [
        ("a", 90, 100),
        ("b", 10, 0),
        ("c", 0, 0),
    ]
    assert found[1]["note"] == "its share goes to the others: it is paused"
    assert found[2]["note"] == "by rules only"


def test_a_roll_over_shows_what_serves_until_then() -> None:
    endpoint = {"targets": [{"deployment": "b", "weight": 100}], "rules": []}
    entry = {"targets": [{"deployment": "a", "weight": 100}], "withheld": {}}
    b, a = rows(endpoint, entry, {}, {})
    assert b["note"] == "waits until every new target is ready"
    assert a["note"] == "serves until the new targets are ready"
