"""Changes of a key, and what the audit log shows of them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from services.registry.domain import audit, keys
from services.registry.domain.usage import as_csv
from tidegate.kernel.errors import BadRequest, Conflict
from tidegate.kernel.protocol.access import Allowance, Key, TokenAllowance, digest_of
from tidegate.kernel.protocol.usage import COUNTS, Subject, UsageReport, day_of

pytestmark = pytest.mark.unit

NOW = datetime(2026, 1, 2, tzinfo=UTC)
RANDOM = bytes(range(keys.ID_BYTES + keys.SECRET_BYTES))


def held(**fields) -> keys.StoredKey:
    return keys.created(keys.parse_spec({"name": "a"} | fields, NOW), RANDOM, NOW)[0]


def test_a_key_is_random():
    key, shown = keys.created(keys.parse_spec({"name": "a"}, NOW), RANDOM, NOW)
    assert (key.id, key.digest) == ("000102030405", digest_of(shown.encode()))
    assert shown.startswith("tg_000102030405_")
    assert (key.spec.scopes, key.state(NOW)) == (["infer"], "active")


def test_bursts():
    assert held(rate=2.5).spec.allowance() == Allowance(rate=2.5, burst=3)
    assert held(rate=2.5, burst=9).spec.allowance() == Allowance(rate=2.5, burst=9)
    assert held(rate=0.1).spec.allowance().burst == 1
    assert held(day=3).spec.allowance() == Allowance(day=3)
    assert held().spec.allowance().unlimited


def test_limits_of_tokens_reach_the_gateways():
    key = held(tokens_per_minute=1000, endpoint_tokens={"chat": {"tokens_per_day": 50}})
    known = key.for_gateways()
    assert (known.tokens, known.endpoint_tokens) == (TokenAllowance(1000), {"chat": TokenAllowance(None, 50)})
    assert Key.from_dict(known.to_dict()) == known
    less = keys.changed(key, {"endpoint_tokens": {"chat": {"tokens_per_minute": 7}, "tags": None}}, NOW)
    assert less.for_gateways().endpoint_tokens == {"chat": TokenAllowance(7, 50)}
    assert keys.changed(less, {"endpoint_tokens": None}, NOW).for_gateways().endpoint_tokens == {}
    older = {name: value for name, value in known.to_dict().items() if "tokens" not in name}
    assert Key.from_dict(older).tokens.unlimited


@pytest.mark.parametrize("fields", [{"tokens_per_minute": 0}, {"endpoint_tokens": {"chat": {"day": 3}}}])
def test_a_wrong_limit_of_tokens(fields):
    with pytest.raises(BadRequest):
        held(**fields)


@pytest.mark.parametrize("grace_s", [0.0, 60.0])
def test_rotation(grace_s):
    key = held(ttl_s=30)
    fresh, shown = keys.rotated(key, RANDOM[:32], NOW, grace_s)
    assert (fresh.id, fresh.digest) == (key.id, digest_of(shown.encode()))
    expected = (key.digest, key.spec.expires_at) if grace_s else (None, None)
    assert (fresh.previous_digest, fresh.previous_until) == expected, "never beyond the key's own end"


def test_revocation():
    gone = keys.revoked(held(), NOW)
    assert gone.state(NOW) == "revoked"
    assert keys.revoked(gone, NOW + timedelta(days=1)) == gone
    for change in (lambda: keys.changed(gone, {"rate": 1}, NOW), lambda: keys.rotated(gone, b"", NOW, 0)):
        with pytest.raises(Conflict):
            change()
    assert held(ttl_s=5).state(NOW + timedelta(seconds=5)) == "expired"


def test_changes():
    key = held(rate=5, burst=50, endpoints=["b", "a", "a"])
    assert key.spec.endpoints == ["a", "b"]
    assert keys.changed(key, {"burst": None}, NOW).spec.allowance() == Allowance(rate=5, burst=5)
    assert keys.changed(key, {"endpoints": None}, NOW).spec.endpoints is None
    assert keys.changed(key, {"ttl_s": 9}, NOW).spec.expires_at == NOW + timedelta(seconds=9)
    with pytest.raises(BadRequest, match="a burst needs a rate"):
        keys.changed(key, {"rate": None}, NOW)
    with pytest.raises(BadRequest, match="either ttl_s or expires_at"):
        keys.parse_spec({"name": "a", "ttl_s": 1, "expires_at": NOW}, NOW)
    for wrong in ("60", [1], 1e30, float("nan")):
        with pytest.raises(BadRequest, match="ttl_s must be a number of seconds"):
            keys.parse_spec({"name": "a", "ttl_s": wrong}, NOW)


def test_environments_are_hidden_and_their_changes_seen():
    before = {"name": "d", "revision": 1, "env": {"A": "1", "B": "2", "C": "3"}}
    after = {"name": "d", "revision": 2, "env": {"A": "1", "B": "x", "D": "4"}}
    hidden, changed = audit.HIDDEN, audit.HIDDEN_CHANGED
    assert audit.audited(before, after) == (
        {"name": "d", "env": {"A": hidden, "B": hidden, "C": hidden}},
        {"name": "d", "env": {"A": hidden, "B": changed, "D": hidden}},
    )
    assert audit.audited(None, {"env": {"A": "1"}}) == (None, {"env": {"A": hidden}})
    assert audit.audited({"a": 1}, None) == ({"a": 1}, None)


def test_csv():
    row = dict.fromkeys(COUNTS, 1) | {"day": "2026-01-02", "principal": "k", "principal_name": "=HYPERLINK()"}
    lines = as_csv([row], ("day", "principal")).split("\r\n")
    assert lines[0] == "day,principal,principal_name," + ",".join(COUNTS)
    assert lines[1] == "2026-01-02,k,'=HYPERLINK(),1,1,1,1,1,1,1"


def test_reports_survive_encoding():
    report = UsageReport("beef", 3, {Subject(NOW.date(), "jwt:ü", "digits"): (1, 2, 3, 4, 5, 6, 7)})
    assert UsageReport.from_json(report.to_json()) == report
    assert day_of(NOW.timestamp() - 0.5) == NOW.date() - timedelta(days=1)
    for wrong in (b"", b"{}", b'{"v": 2}', report.to_json().replace(b",7]", b"]")):
        with pytest.raises((ValueError, KeyError, TypeError)):
            UsageReport.from_json(wrong)
