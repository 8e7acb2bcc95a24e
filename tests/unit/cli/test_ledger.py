"""`tidegate ledger` and `tidegate webhook-secret`."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytestmark = pytest.mark.unit

WELL = {
    "at": 1.0,
    "unaccounted": 0,
    "away": {},
    "acknowledged": 20_000,
    "accepted": 20_003,
    "over": {"succeeded": 19_000, "failed": 3, "cancelled": 0, "expired": 0},
    "unfinished": {"accepting": 0, "queued": 990, "running": 10},
    "messages": {"ready": 900, "held": 100, "watched": 0},
    "kept": 19_003,
    "removed": 0,
    "missing": {"records": 0, "endings": 0, "messages": 0},
}


def test_a_ledger_that_balances(plane: Any, tidegate: Any) -> None:
    plane.answers["GET /v1/ledger"] = WELL
    code, out, _ = tidegate("ledger")
    assert code == 0
    assert "unaccounted  0" in out
    assert "19000" in out
    code, out, _ = tidegate("ledger", "--json")
    assert code == 0
    assert json.loads(out) == WELL


def test_a_lost_job_is_an_error(plane: Any, tidegate: Any) -> None:
    lost = {**WELL, "unaccounted": 2, "missing": {"records": 0, "endings": 0, "messages": 2}}
    plane.answers["GET /v1/ledger"] = lost
    code, out, err = tidegate("ledger")
    assert code == 1
    assert "unaccounted  2" in out
    assert "missing in the last count: 2 messages" in err


def test_an_unknown_ledger(plane: Any, tidegate: Any) -> None:
    plane.answers["GET /v1/ledger"] = {"at": 1.0, "unaccounted": None, "away": {"broker": "not connected"}}
    code, out, err = tidegate("ledger")
    assert code == 6
    assert "unknown" in out
    assert "broker: not connected" in err
    assert tidegate("ledger", "--json")[0] == 6


def test_the_secret_of_webhooks(plane: Any, tidegate: Any) -> None:
    plane.answers["GET /v1/webhooks/secret"] = {"principal": "anonymous", "secret": "whsec_abc"}
    code, out, _ = tidegate("webhook-secret")
    assert (code, out.strip()) == (0, "whsec_abc")
    assert plane.seen[-1] == "router GET /v1/webhooks/secret"
