"""`tidegate dead` and what it can do to a letter."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.unit

ID = "00112233aabbccdd"
LETTER = {
    "letter": ID,
    "at": 1.0,
    "kind": "request",
    "id": "ff" * 16,
    "deployment": "digits-v1",
    "queue": "requests.v1.digits-v1",
    "cause": "attempts_exhausted",
    "tenant": "acme",
    "attempt": 3,
    "trace": "abc",
    "size": 100,
    "payload": True,
    "payload_bytes": 2_500,
    "missing": "",
    "replays": [],
}
REPLAY = {"job": "0a" * 16, "to": "digits-v2", "at": 2.0, "status": "failed"}
FAILED = REPLAY | {"error": {"reason": "model_failed", "message": "no"}}


def test_the_list(plane: Any, tidegate: Any) -> None:
    plane.answers["GET /v1/dead"] = {"items": [LETTER, LETTER | {"payload": False, "replays": [FAILED]}]}
    code, out, _ = tidegate("dead")
    assert code == 0
    assert ID in out
    assert "2.5 kB" in out
    code, out, _ = tidegate("dead", "--json")
    assert len(json.loads(out)["items"]) == 2


def test_one_that_was_replayed(plane: Any, tidegate: Any) -> None:
    plane.answers[f"GET /v1/dead/{ID}"] = LETTER | {"replays": [FAILED]}
    code, out, _ = tidegate("dead", "show", ID)
    assert code == 0
    assert "digits-v2: failed model_failed: no" in out


def test_one_without_a_payload_says_why(plane: Any, tidegate: Any) -> None:
    plane.answers[f"GET /v1/dead/{ID}"] = LETTER | {"payload": False, "missing": "it had to make room"}
    _, out, _ = tidegate("dead", "show", ID)
    assert "none: it had to make room" in out


def test_a_download_is_for_its_owner_only(plane: Any, tidegate: Any, tmp_path: Path) -> None:
    plane.answers[f"GET /v1/dead/{ID}/payload"] = lambda _: httpx.Response(200, content=b"frame")
    file = tmp_path / "frame"
    code, out, _ = tidegate("dead", "download", ID, "-o", str(file), "--json")
    assert (code, json.loads(out)) == (0, {"file": str(file), "bytes": 5})
    assert file.read_bytes() == b"frame"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_download_that_fails_leaves_nothing(plane: Any, tidegate: Any, tmp_path: Path) -> None:
    code, _, _ = tidegate("dead", "download", ID, "-o", str(tmp_path / "frame"))
    assert code != 0
    assert list(tmp_path.iterdir()) == []


def test_a_replay_elsewhere(plane: Any, tidegate: Any) -> None:
    plane.answers[f"POST /v1/dead/{ID}/replay"] = LETTER | {"replays": [REPLAY | {"error": None}]}
    code, out, _ = tidegate("dead", "replay", ID, "--to", "digits-v2")
    assert code == 0
    assert REPLAY["job"] in out
    assert json.loads(plane.bodies[-1]) == {"to": "digits-v2"}


def test_all_of_a_deployment_are_replayed(plane: Any, tidegate: Any) -> None:
    items = [{"letter": ID, "job": "0a" * 16, "error": None}, {"letter": ID, "job": None, "error": "gone"}]
    plane.answers["POST /v1/dead/replay"] = {"items": items}
    code, out, _ = tidegate("dead", "replay", "--all", "--deployment", "digits-v1")
    assert code == 0
    assert "gone" in out
    assert json.loads(plane.bodies[-1]) == {"deployment": "digits-v1", "to": None}


@pytest.mark.parametrize("words", [(), (ID, "--all"), (ID, "--deployment", "digits-v1")])
def test_which_are_to_be_replayed_must_be_clear(plane: Any, tidegate: Any, words: tuple[str, ...]) -> None:
    code, _, err = tidegate("dead", "replay", *words)
    assert code == 2
    assert "--" in err
    assert plane.seen == []


def test_deleting_one(plane: Any, tidegate: Any) -> None:
    plane.answers[f"DELETE /v1/dead/{ID}"] = lambda _: httpx.Response(204)
    code, _, _ = tidegate("dead", "delete", ID)
    assert code == 0
    assert plane.seen == [f"router DELETE /v1/dead/{ID}"]
