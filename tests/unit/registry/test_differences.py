"""The changed fields of objects, from the entries of the audit log."""

from datetime import UTC, datetime
from typing import Any

from services.registry.domain.audit import HIDDEN, HIDDEN_CHANGED, NewAuditEntry
from services.registry.domain.differences import of_objects


def entry(kind: str, name: str, before: Any, after: Any) -> NewAuditEntry:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    return NewAuditEntry(now, "root", "", "", "", "updated", kind, name, before, after, 1)


def shown(*entries: NewAuditEntry) -> dict[tuple[str, str], list[tuple[str, Any, Any]]]:
    found = of_objects(entries)
    return {key: [(each.field, each.before, each.after) for each in value] for key, value in found.items()}


def test_nested_fields_have_paths_and_lists_are_whole():
    before = {"min": 1, "batching": {"max": 8, "window": 2}, "targets": [{"w": 1}], "same": {"a": 1}}
    after = {"min": 1, "batching": {"max": 8, "window": 3}, "targets": [{"w": 2}], "same": {"a": 1}, "new": 4}
    assert shown(entry("deployment", "d", before, after)) == {
        ("deployment", "d"): [
            ("batching.window", 2, 3),
            ("targets", [{"w": 1}], [{"w": 2}]),
            ("new", None, 4),
        ]
    }


def test_several_changes_of_one_object_are_one():
    first, second, third = ({"targets": [n], "weight": 1} for n in range(3))
    key = ("endpoint", "e")
    assert shown(entry(*key, first, second), entry(*key, second, third)) == {key: [("targets", [0], [2])]}
    assert shown(entry(*key, first, second), entry(*key, second, first)) == {key: []}
    assert shown(entry(*key, None, first), entry(*key, first, second)) == {key: []}, "it was created"


def test_the_policy_and_the_aliases_of_a_model_are_its_fields():
    entries = (
        entry("policy", "m", {"serve_from": None}, {"serve_from": "production"}),
        entry("alias", "m/champion", {"version": 1}, {"version": 2}),
        entry("alias", "m/new", None, {"version": 2}),
        entry("alias", "m/old", {"version": 1}, None),
        entry("alias", "other/champion", {"version": 7}, {"version": 8}),
    )
    assert shown(*entries) == {
        ("model", "m"): [
            ("serve_from", None, "production"),
            ("aliases.champion", 1, 2),
            ("aliases.new", None, 2),
            ("aliases.old", 1, None),
        ],
        ("model", "other"): [("aliases.champion", 7, 8)],
    }


def test_a_hidden_value_that_an_earlier_entry_changed_stays_changed():
    """The second entry compares with the changed value."""
    first = {"env": {"A": HIDDEN}, "min": 0}, {"env": {"A": HIDDEN_CHANGED}, "min": 0}
    second = {"env": {"A": HIDDEN}, "min": 0}, {"env": {"A": HIDDEN}, "min": 1}
    assert shown(entry("deployment", "d", *first), entry("deployment", "d", *second)) == {
        ("deployment", "d"): [("env.A", HIDDEN, HIDDEN_CHANGED), ("min", 0, 1)]
    }
