"""Authentication and admission without I/O: credentials, known credentials, scopes, headers."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from services.gateway.api.jobs import JobHandlers
from services.gateway.application import access as module
from services.gateway.application.access import Access, Grant
from services.gateway.domain.jwt_claims import principal_of
from services.gateway.domain.key_limiter import KeyLimiter
from services.gateway.domain.key_table import KeyTable
from services.gateway.domain.rate_limit_headers import policy, seconds_left
from services.gateway.domain.usage_cost import UsageCost, compute_us
from tidegate.kernel.errors import Forbidden, TooMany, Unauthorized, Unavailable
from tidegate.kernel.protocol import access
from tidegate.kernel.protocol.access import (
    ANONYMOUS,
    SERVICE,
    Allowance,
    Key,
    Principal,
    carried,
    digest_of,
    key_id,
    key_of,
)
from tidegate.kernel.protocol.envelope import Reply
from tidegate.kernel.protocol.usage import MOST_TOKENS, tokens
from tidegate.kernel.service import caller
from tidegate.kernel.service.caller import Caller

pytestmark = pytest.mark.unit

KEY = key_of("ab12", "s" * 43).encode()
OLD = key_of("ab12", "o" * 43).encode()
WHO = Principal("ab12", "robot", frozenset({"infer"}), frozenset({"digits"}))


def table(**given) -> KeyTable:
    return KeyTable("1", {"ab12": Key(WHO, digest_of(KEY), **given)})


class AccessFixture:
    """An Access whose counts and limiters a test can read."""

    def __init__(self, required: bool = False, verify=None, allowance: Allowance | None = None) -> None:
        self.counts: dict[tuple[str, str], list[int]] = {}
        self.limiters = {"ab12": KeyLimiter("ab12", allowance, lambda _: None)} if allowance else {}
        self.access = Access(
            required=required,
            service_token="token",
            count=lambda *who: self.counts.setdefault(who, [0] * 7),
            limiters=self.limiters,
            verify=verify,
        )

    def admit(self) -> Grant:
        grant = self.access.admit(WHO, "digits")
        assert grant is not None
        return grant

    def known(self, credential: bytes) -> Principal:
        return self.access.authenticate({b"authorization": credential})


def test_without_a_credential():
    assert AccessFixture().access.authenticate({}) is ANONYMOUS
    with pytest.raises(Unauthorized, match="tidegate keys create"):
        AccessFixture(required=True).access.authenticate({})


def test_a_word_for_no_key_is_no_credential():
    assert AccessFixture().known(b"Bearer EMPTY") is ANONYMOUS
    with pytest.raises(Unauthorized):
        AccessFixture(required=True).known(b"Bearer EMPTY")


def test_credentials():
    fixture = AccessFixture(required=True)
    assert fixture.known(b"Bearer token") is SERVICE
    with pytest.raises(Unavailable) as caught:
        fixture.known(b"Bearer " + KEY)
    assert caught.value.reason == "not_known_yet", "that is not the caller's fault"
    assert "does not know the keys yet" in (fixture.access.problem() or "")
    fixture.access.replace(table())
    assert fixture.access.problem() is None
    assert fixture.known(b"Bearer " + KEY) == WHO
    signed = (
        b"AWS4-HMAC-SHA256 Credential=" + KEY + b"/20261129/eu-central-1/sagemaker/aws4_request, Signature="
    )
    assert fixture.known(signed + b"1") == fixture.known(signed + b"2") == WHO
    for wrong in (b"Bearer " + OLD, b"Bearer tg_zz_s", b"Bearer x", b"Basic x", KEY, b"", b"Bearer \xff\xfe"):
        with pytest.raises(Unauthorized):
            fixture.known(wrong)


def test_a_known_credential_is_not_hashed_again(monkeypatch):
    fixture = AccessFixture()
    fixture.access.replace(table())
    assert fixture.known(b"Bearer " + KEY) == WHO
    monkeypatch.setattr(access, "digest_of", None)
    assert fixture.known(b"Bearer " + KEY) == WHO
    monkeypatch.undo()
    fixture.access.replace(KeyTable("2", {}))
    with pytest.raises(Unauthorized):
        fixture.known(b"Bearer " + KEY)


def test_a_known_credential_expires(monkeypatch):
    now = time.time()
    fixture = AccessFixture()
    fixture.access.replace(table(expires_ms=(now + 60) * 1e3))
    assert fixture.known(b"Bearer " + KEY) == WHO
    monkeypatch.setattr(time, "time", lambda: now + 61)
    with pytest.raises(Unauthorized):
        fixture.known(b"Bearer " + KEY)


def test_the_number_of_known_credentials_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "REMEMBERED", 2)
    fixture = AccessFixture(
        verify=lambda bearer: (Principal(f"jwt:{bearer.decode()}", "", frozenset()), 1e15)
    )
    for number in range(7):
        assert fixture.known(b"Bearer t%d" % number).id == f"jwt:t{number}"
        assert len(fixture.access._known) <= 2


def test_the_secret_from_before_a_rotation():
    keys = table(previous=digest_of(OLD), previous_until_ms=500.0, expires_ms=900.0)
    key = keys.keys["ab12"]
    assert [keys.find(OLD, at) for at in (499.0, 500.0)] == [(key, 500.0), None]
    assert [keys.find(KEY, at) for at in (899.0, 900.0)] == [(key, 900.0), None]


def test_the_permissions_of_a_principal():
    fixture = AccessFixture()
    assert fixture.access.admit(ANONYMOUS, "digits") is None
    assert fixture.access.admit(SERVICE, "digits") is None
    with pytest.raises(Forbidden):
        fixture.access.admit(WHO, "letters")
    with pytest.raises(Forbidden):
        fixture.access.admit(Principal("p", "p", frozenset({"publish"})), "digits")
    admin = Principal("a", "a", frozenset({"admin"}), frozenset({"digits"}))
    assert admin.may("infer", "digits")
    assert not admin.may("infer", "letters"), "bound is bound"
    assert not admin.may("operate", "digits"), "no other deed is limited to an endpoint"


def test_a_grant_counts_once():
    fixture = AccessFixture(allowance=Allowance(concurrency=2))
    grant = fixture.admit()
    grant.done(compute_us=5, received=1, sent=2, tokens_in=3, tokens_out=4)
    grant.done(failed=True)
    grant.cancel()
    assert fixture.counts == {("ab12", "digits"): [1, 0, 5, 1, 2, 3, 4]}
    assert fixture.limiters["ab12"].in_flight == 0
    fixture.admit().cancel()
    fixture.admit().accepted(9)
    assert fixture.counts == {("ab12", "digits"): [1, 0, 5, 10, 2, 3, 4]}
    fixture.admit().streamed(UsageCost(), 1)
    assert fixture.counts["ab12", "digits"][:2] == [1, 0], "a refused request is not counted"
    fixture.admit().streamed(UsageCost(queued=True), 1)
    assert fixture.counts["ab12", "digits"][:2] == [2, 1], "a stream without an answer has failed"
    assert fixture.limiters["ab12"].in_flight == 0


async def test_a_retried_job_counts_only_at_its_end():
    class FakeJobs:
        async def find(self, *_):
            return SimpleNamespace(endpoint="digits")

        async def retry(self, _):
            return SimpleNamespace(job=SimpleNamespace(id=bytes(16)), position=None)

    fixture = AccessFixture(allowance=Allowance(concurrency=2))
    answers: Any = SimpleNamespace(document=lambda *_: {})
    jobs: Any = FakeJobs()
    mark = caller.current.set(Caller(WHO))
    try:
        answer = await JobHandlers(jobs, jobs, answers, fixture.access).retry(bytes(16).hex())
    finally:
        caller.current.reset(mark)
    assert answer.status_code == 202
    assert not any(map(sum, fixture.counts.values()))
    assert fixture.limiters["ab12"].in_flight == 0


def test_too_many_requests_says_when_to_retry():
    fixture = AccessFixture(allowance=Allowance(rate=2, burst=2, day=1000))
    for _ in range(2):
        fixture.access.admit(WHO, "digits")
    with pytest.raises(TooMany) as caught:
        fixture.access.admit(WHO, "digits")
    assert (caught.value.reason, caught.value.retry_after_s) == ("rate_limited", 0.5)
    assert caught.value.headers["RateLimit-Policy"] == '"rate";q=2;w=1, "day";q=1000;w=86400'
    assert caught.value.headers["RateLimit"].startswith('"rate";r=0;t=1, "day";r=998;t=')


def test_policies():
    assert policy(Allowance(rate=100, burst=250)) == b'"rate";q=250;w=3'
    assert policy(Allowance(concurrency=5)) == b'"concurrency";q=5;qu="concurrent-requests"'
    assert policy(Allowance(month=9)) == b'"month";q=9;w=2592000'
    limiter = KeyLimiter("k", Allowance(concurrency=5, month=9), lambda _: None)
    assert limiter.take(0.0) is None
    assert limiter.remaining_header(86_400 * 30.0) == b'"concurrency";r=4, "month";r=8;t=86400'


@pytest.mark.parametrize(
    ("limit", "at", "expected"),
    [
        ("day", 0.0, 86_400.0),
        ("day", 86_399.5, 0.5),
        ("month", 0.0, 31 * 86_400.0),
        ("month", 31 * 86_400.0, 28 * 86_400.0),
        ("month", 364 * 86_400.0, 86_400.0),
    ],
)
def test_periods_end(limit, at, expected):
    assert seconds_left(limit, at) == expected


def test_keys_name_themselves():
    assert key_id(KEY) == "ab12"
    for none in (b"", b"tg", b"tg_", b"tg_a", b"tg_a_", b"tg__s", b"xx_a_s", b"e30.e30.sig"):
        assert key_id(none) is None
    assert key_id(b"tg_a_b_c-d") == "a", "a secret may have what base64 has"


def test_a_principal_travels_in_a_header():
    for who in (WHO, SERVICE, Principal("jwt:ü\n", "ü", frozenset())):
        header = who.to_header()
        assert header.isascii()
        assert header.isprintable()
        assert carried({b"x-tidegate-principal": header.encode()}) == who
    assert carried({}) is SERVICE
    for wrong in (b"", b"[]", b"{}", b'{"id": 1}', b'{"id": "a", "name": "b", "scopes": 1}'):
        with pytest.raises(ValueError, match=r".+"):
            carried({b"x-tidegate-principal": wrong})


def test_a_key_travels_to_gateways():
    key = Key(WHO, "d", 5.0, Allowance(1.5, 3, 4, 5, 6), "p", 7.0)
    assert Key.from_dict(key.to_dict()) == key
    assert KeyTable.from_dict({"mark": "9", "keys": [key.to_dict()]}).keys == {"ab12": key}
    for wrong in ({}, {"mark": "1", "keys": [{}]}, {"mark": "1", "keys": [None]}):
        with pytest.raises((KeyError, TypeError)):
            KeyTable.from_dict(wrong)


def test_roles():
    claims = {"sub": "u", "name": "Ü\n", "realm": {"roles": ["infer", "ops", 7]}, "scope": "infer admin x"}
    assert principal_of(claims, "realm.roles", {}) == Principal("jwt:u", "Ü", frozenset({"infer"}))
    assert principal_of(claims, "scope", {}).scopes == {"infer", "admin"}
    mapped = principal_of(claims, "realm.roles", {"ops": ["operate", "publish"]})
    assert mapped.scopes == {"operate", "publish"}, "with a mapping a role's name alone gives nothing"
    for path in ("nothing", "realm.nothing.more", "sub.x", "name"):
        assert principal_of(claims, path, {}).scopes == set()
    assert len(principal_of({"sub": "x" * 500}, "roles", {}).id) < 100


def test_the_usage_cost_of_an_answer():
    reply = Reply(b"", 0, 1, 0, 1, 10, 900, 3, b"", [])
    assert compute_us(reply) == 300
    assert compute_us(reply._replace(shared=0)) == 900
    assert tokens({}) == (0, 0)
    assert tokens({"prompt_tokens": 7, "output_tokens": 9}) == (7, 9)
    assert tokens({"prompt_tokens": True, "completion_tokens": "3"}) == (0, 0)
    assert tokens({"prompt_tokens": 2**62}) == (MOST_TOKENS, 0), "sums must fit into 64 bits"
    spent = UsageCost()
    for number in (1, 2):
        spent.add(reply, {"completion_tokens": number * 10}, 5)
    assert spent == UsageCost(answers=2, compute_us=600, whole_us=1800, sent=10, tokens_in=0, tokens_out=20)
