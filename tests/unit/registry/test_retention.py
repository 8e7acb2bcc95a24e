"""Retention, the restoration of versions, aliases and quotas, without a database."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from services.registry.domain import aliases, quotas, removal, retention
from services.registry.domain.model_policy import ModelPolicy, RetentionPolicy, patched
from services.registry.domain.quotas import Quota, Used
from tests.unit.registry.conftest import Book
from tidegate.kernel.errors import BadRequest, Conflict, Forbidden, NotFound

NOW = datetime(2026, 3, 1, tzinfo=UTC)


def created(count: int) -> dict[int, datetime]:
    """Return versions of which one was registered each day, the last one today."""
    return {number: NOW - timedelta(days=count - number) for number in range(1, count + 1)}


def gone(book: Book, count: int, **policy: object) -> list[int]:
    limits = RetentionPolicy.model_validate(policy)
    found = retention.fates(book.now, "digits", created(count), {}, limits, NOW)
    return [fate.version for fate in found if fate.delete]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ({}, []),
        ({"keep_last": 3}, [1, 2]),
        ({"keep_last": 9}, []),
        ({"max_age_days": 2.5}, [1, 2]),
        ({"max_age_days": 0.5}, [1, 2, 3, 4]),
        ({"keep_last": 1, "max_age_days": 3.5}, [1]),
        ({"keep_last": 4, "max_age_days": 0.5}, [1]),
    ],
)
def test_count_and_age(policy, expected):
    assert gone(Book(digits=5), 5, **policy) == expected


def test_versions_in_use_are_kept_and_sleeping_ones_only_if_asked():
    book = Book(digits=5)
    for number in (1, 2):
        book.deploy(version=number)
        book.settle()
    book.put_deployment("own", model="digits", version=3, min_replicas=0)
    assert gone(book, 5, keep_last=1) == [4]
    assert gone(book, 5, keep_last=1, sleeping=True) == [1, 4], "version 3 was declared by a user"
    limits = RetentionPolicy(keep_last=1, sleeping=True)
    found = retention.fates(book.now, "digits", created(5), {4: "endpoint 'digits'"}, limits, NOW)
    assert [(fate.version, fate.deployments) for fate in found if fate.delete] == [(1, ("digits-v1",))]
    book.carry_out(retention.deletions("digits", found))
    assert book.now.numbers("digits") == [2, 3, 4, 5]
    assert "digits-v1" not in book.now.deployments
    assert book.now.deleted == {("digits", 1)}


def test_a_deleted_version_is_restored_or_removed_for_good(book):
    book.carry_out(removal.delete_version(book.now, "digits", 2))
    with pytest.raises(NotFound):
        removal.delete_version(book.now, "digits", 2)
    with pytest.raises(Conflict, match="is not deleted"):
        removal.restore(book.now, "digits", 1)
    with pytest.raises(NotFound, match="These can be restored: 2"):
        removal.restore(book.now, "digits", 9)
    book.carry_out(removal.restore(book.now, "digits", None))
    assert book.now.numbers("digits") == [1, 2, 3]
    book.carry_out(removal.delete_version(book.now, "digits", 2))
    book.carry_out(removal.delete_version(book.now, "digits", 2, permanent=True))
    assert (book.now.numbers("digits"), book.now.deleted) == ([1, 3], frozenset())
    with pytest.raises(NotFound):
        removal.restore(book.now, "digits", None)


def test_aliases_protect_their_version(book):
    book.carry_out(aliases.put(book.now, "digits", "champion", 2))
    assert aliases.put(book.now, "digits", "champion", 2) == []
    with pytest.raises(
        Conflict, match="points to version 2, but the request expected it to point to version 1"
    ):
        aliases.put(book.now, "digits", "champion", 3, expected=1)
    with pytest.raises(Conflict, match="expected no such alias"):
        aliases.put(book.now, "digits", "champion", 3, expected=0)
    with pytest.raises(Conflict, match="has the alias 'champion'"):
        removal.delete_version(book.now, "digits", 2)
    with pytest.raises(NotFound, match=r"Its aliases: champion \(2\)"):
        aliases.drop(book.now, "digits", "winner")
    assert gone(book, 3, keep_last=1) == [1]
    for each in range(aliases.MOST - 1):
        book.carry_out(aliases.put(book.now, "digits", f"a{each}", 1))
    with pytest.raises(BadRequest, match="aliases, the limit"):
        aliases.put(book.now, "digits", "another", 1)
    book.carry_out(removal.delete_model(book.now, "digits", cascade=True))
    assert book.now.aliases == {}


def test_policies_are_patched():
    policy = patched(ModelPolicy(), {"retention": {"keep_last": 3}})
    assert patched(policy, {"retention": {"max_age_days": 5}}).retention == RetentionPolicy(
        keep_last=3, max_age_days=5
    )
    assert patched(policy, {"retention": None}) == ModelPolicy()
    for wrong in ({"retention": {"keep_last": 0}}, {"retention": {"keep": 1}}, {"other": 1}):
        with pytest.raises(BadRequest, match="policy"):
            patched(policy, wrong)


def test_a_quota_counts_versions_and_bytes():
    quotas.check(Quota("ci"), Used(10**6, 10**12), 1)
    quotas.check(Quota("ci", versions=3, artifact_bytes=100), Used(2, 90), 10)
    with pytest.raises(Forbidden, match="has 3 registered versions, and the key's quota is 3"):
        quotas.check(Quota("ci", versions=3), Used(3, 0), 0)
    with pytest.raises(
        Forbidden, match=r"have 90 bytes\. With 11 more, they would exceed the key's quota of 100"
    ):
        quotas.check(Quota("ci", artifact_bytes=100), Used(0, 90), 11)
