"""Limits of callers with a JWT: which apply, and when they are forgotten."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from services.gateway.application.access import Access
from services.gateway.application.jwt_callers import FORGET_S, JwtCallers
from services.gateway.domain.jwt_claims import principal_of
from services.gateway.domain.key_limiter import KeyLimiter
from services.gateway.domain.llm.token_headers import TokenAccount
from services.gateway.domain.llm.token_refusals import check_fits
from tidegate.kernel.errors import BadRequest, TooMany
from tidegate.kernel.protocol.access import Allowance, Principal, TokenAllowance
from tidegate.kernel.protocol.caller_limits import CallerLimits

pytestmark = pytest.mark.unit

SLOW, FAST = CallerLimits(rate=1, burst=2, weight=3), CallerLimits(rate=100, tokens_per_day=1000)
STATED = {"batch": SLOW, "admins": CallerLimits(), "*": FAST}


class Callers:
    """A JwtCallers with a fake clock, and a record of the limits that it set."""

    def __init__(self, stated: Mapping[str, CallerLimits] = STATED, most: int = 3) -> None:
        self.now = 0.0
        self.limits: dict[str, Allowance | None] = {}
        self.tokens: dict[str, TokenAllowance | None] = {}
        self.calls = 0
        self.busy: set[str] = set()
        self.callers = JwtCallers(
            stated,
            self._set,
            self.tokens.__setitem__,
            busy=lambda id_: id_ in self.busy,
            clock=lambda: self.now,
            most=most,
        )

    def _set(self, principal: str, allowance: Allowance | None) -> None:
        self.calls += 1
        self.limits[principal] = allowance


def who(name: str, role: str = "batch") -> Principal:
    return Principal(f"jwt:{name}", name, frozenset({"infer"}), role=role)


@pytest.mark.parametrize(
    ("roles", "role"),
    [
        (["batch"], "batch"),
        (["other"], "*"),
        ([], "*"),
        (["admins", "batch"], "batch"),
        (["admins"], "admins"),
    ],
)
def test_the_first_stated_role_decides(roles: list[str], role: str) -> None:
    principal = principal_of({"sub": "u", "realm": {"roles": roles}}, "realm.roles", {}, STATED)
    assert (principal.role, principal.weight) == (role, 3 if role == "batch" else 1)


def test_without_a_matching_role_there_are_no_limits() -> None:
    for stated in ({"batch": SLOW}, {}):
        principal = principal_of({"sub": "u", "roles": ["x"]}, "roles", {}, stated)
        assert (principal.role, principal.weight) == ("", 1)
        found = Callers(stated)
        found.callers.verified(principal)
        assert found.limits == {"jwt:u": None}


def test_limits_are_set_once_and_changed_with_the_role() -> None:
    found = Callers()
    found.callers.verified(who("u"))
    found.callers.verified(who("u"))
    assert found.calls == 1
    assert found.limits["jwt:u"] == Allowance(1, 2)
    assert found.tokens["jwt:u"] is None
    found.callers.verified(who("u", "*"))
    assert found.limits["jwt:u"] == Allowance(100, 100)
    assert found.tokens["jwt:u"] == TokenAllowance(None, 1000)
    found.callers.verified(who("u", "admins"))
    assert set(found.limits.values()) | set(found.tokens.values()) == {None}


def test_callers_are_forgotten_only_long_after_their_last_token() -> None:
    found = Callers()
    for name in ("a", "b", "c", "d"):
        found.callers.verified(who(name))
        found.now += 1
    assert None not in found.limits.values(), "they may still have requests"
    found.now += FORGET_S
    found.busy.add("jwt:c")
    found.callers.verified(who("a"))
    found.callers.verified(who("e"))
    assert [name for name, limits in found.limits.items() if limits is None] == ["jwt:b", "jwt:d"]


def test_the_lines_of_a_batch_have_the_limits_of_its_role_in_every_process() -> None:
    found = Callers()
    found.callers.verified(who("admin", "admins"))
    assert not found.callers.unknown(who("admin", "admins")), "it is known, and its role has no limits"
    assert not found.callers.unknown(Principal("ab12", "a key", frozenset()))
    assert found.callers.unknown(who("other"))
    assert found.limits["jwt:other"] == Allowance(1, 2)
    assert found.callers.unknown(who("old", "")), "its batch is of an older release"
    assert found.limits["jwt:old"] == Allowance(100, 100)
    assert not Callers({"batch": SLOW}).callers.unknown(who("free", ""))
    assert Callers({"batch": SLOW}).callers.unknown(who("slow"))


def test_requests_over_the_limit_are_refused() -> None:
    limiters: dict[str, KeyLimiter] = {}

    def set_limits(principal: str, allowance: Allowance | None) -> None:
        assert allowance is not None
        limiters[principal] = KeyLimiter(principal, allowance, lambda _: None)

    callers = JwtCallers({"*": SLOW}, set_limits, lambda principal, tokens: None)
    counts: dict[Any, list[int]] = {}
    access = Access(
        required=True,
        service_token="token",
        count=lambda *who: counts.setdefault(who, [0] * 7),
        limiters=limiters,
        limit_unknown=callers.unknown,
    )
    for _ in range(2):
        grant = access.admit(who("u"), "digits")
        assert grant is not None
        assert dict(grant.headers())[b"ratelimit-policy"]
    with pytest.raises(TooMany, match="this caller has reached its limit of requests per second"):
        access.admit(who("u"), "digits")
    assert access.admit(who("other"), "digits"), "each has its own limit"


def test_a_request_above_the_token_limit_names_the_setting() -> None:
    account = TokenAccount("jwt:u", "", TokenAllowance(None, 1000))
    with pytest.raises(BadRequest, match=r"the caller jwt:u has a limit of .* TIDEGATE_JWT_LIMITS"):
        check_fits([account], 10, 5000)
