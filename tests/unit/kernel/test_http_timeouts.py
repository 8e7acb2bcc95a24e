"""The decisions about a connection's timeouts, and which connections to close, without a connection."""

from __future__ import annotations

import pytest

from tidegate.kernel.http.heads import MAX_DIGITS, number, without_upgrade
from tidegate.kernel.http.timeouts import (
    LINGER_S,
    UNREAD_S,
    HttpLimits,
    Phase,
    Standing,
    TimeoutDecision,
    decide,
    peer_of,
    to_shed,
)

pytestmark = pytest.mark.unit

LIMITS = HttpLimits(header_timeout_s=10, idle_timeout_s=75, body_grace_s=20, body_bytes_per_s=1000)


@pytest.mark.parametrize(
    ("phase", "limit", "moved", "verdict"),
    [
        (Phase.SILENT, 10, 0, TimeoutDecision.CLOSE),
        (Phase.HEAD, 10, 0, TimeoutDecision.HEADER_TIMEOUT),
        (Phase.IDLE, 75, 0, TimeoutDecision.CLOSE),
        (Phase.CLOSING, LINGER_S, 0, TimeoutDecision.ABORT),
        (Phase.UNREAD, UNREAD_S, 0, TimeoutDecision.ABORT),
        (Phase.UNREAD, UNREAD_S, 1, TimeoutDecision.RENEW),
        (Phase.BODY, 20, 0, TimeoutDecision.TOO_SLOW),
        (Phase.BODY, 20, 19_999, TimeoutDecision.TOO_SLOW),
        (Phase.BODY, 20, 20_000, TimeoutDecision.RENEW),
        (Phase.BUSY, 1e9, 0, TimeoutDecision.WAIT),
    ],
)
def test_each_phase_has_its_time(phase, limit, moved, verdict):
    assert decide(phase, limit - 0.001, moved, LIMITS) is TimeoutDecision.WAIT
    assert decide(phase, limit, moved, LIMITS) is verdict


def test_a_pace_of_nothing_is_no_limit():
    assert decide(Phase.BODY, 1e6, 0, LIMITS._replace(body_bytes_per_s=0)) is TimeoutDecision.RENEW


def test_unknown_callers_go_first_then_by_phase_then_the_oldest():
    standings = [
        Standing(Phase.IDLE, True, 0),
        Standing(Phase.IDLE, False, 5),
        Standing(Phase.IDLE, False, 3),
        Standing(Phase.BODY, False, 1),
        Standing(Phase.HEAD, False, 9),
        Standing(Phase.SILENT, False, 8),
        Standing(Phase.BUSY, False, 0),
        Standing(Phase.BODY, True, 0),
        Standing(Phase.UNREAD, True, 0),
        Standing(Phase.CLOSING, False, 10),
    ]
    assert to_shed(standings, 100, known_before=0) == [9, 5, 4, 3, 2, 1, 0]
    assert to_shed(standings, 2, known_before=0) == [9, 5]
    assert to_shed(standings, 100, known_before=-1) == to_shed(standings, 100) == [9, 5, 4, 3, 2, 1]


def test_what_is_being_answered_never_goes():
    assert to_shed([Standing(Phase.BUSY, False, 0)] * 3, 3) == []


@pytest.mark.parametrize(
    ("address", "peer"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("", ""),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("fe80::1%eth0", "fe80::/64"),
        ("x:y", "x:y"),
    ],
)
def test_a_peer_is_an_address_or_a_network(address, peer):
    assert peer_of(address) == peer


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (b"0", 0),
        (b" 12\t", 12),
        (b"9" * MAX_DIGITS, int("9" * MAX_DIGITS)),
        (b"9" * (MAX_DIGITS + 1), None),
        (b"0" * 5000, None),
        (b"", None),
        (b"-1", None),
        (b"1 2", None),
        (b"\xb2", None),
    ],
)
def test_a_number(value, found):
    assert number(value) == found


def test_a_head_without_its_upgrade():
    fields = [(b"host", b"a"), (b"upgrade", b"x"), (b"connection", b"upgrade"), (b"content-length", b"3")]
    assert without_upgrade(b"POST", b"/p?q", "1.1", fields) == (
        b"POST /p?q HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\ncontent-length: 3\r\n\r\n"
    )
