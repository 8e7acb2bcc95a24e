"""What users see of a verification, against a control plane in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from tidegate.cli.verification import state_words

CARD = {
    "requests_per_s": 1234.5,
    "batches": [{"rows": 8, "p50_ms": 0.5, "p99_ms": 2.0, "rows_per_s": 1234.5}],
    "memory_mb": 133,
    "load_ms": 320.0,
    "start_s": 1.6,
    "cpu": "AMD EPYC",
    "cores": 2,
    "measured_at": "2026-01-01T00:00:00Z",
}
VERSION = {"model": "m", "number": 2, "format": "onnx"}
PATH = "/v1/models/m/versions/2"
PENDING = {"state": "pending", "message": "", "card": None}
VERIFIED = {"state": "verified", "message": "", "card": CARD}
REJECTED = {"state": "rejected", "message": "No module named 'lightgbm'", "card": None}


@pytest.fixture
def plane(plane: Any) -> Any:
    """A version that is pending once, and then as ``plane.end`` says."""
    plane.end = VERIFIED
    states = [PENDING]

    def state(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json=states.pop() if states else plane.end)

    plane.answers |= {
        "GET /v1/models/m": {"latest": VERSION},
        f"GET {PATH}": VERSION | {"verification": PENDING},
        f"GET {PATH}/verification": state,
        f"POST {PATH}/verification": PENDING,
        "GET /v1/verifications": {
            "items": [{"model": "m", "version": 2, "step": "loading the model", "failed_tries": 1}],
            "problem": None,
        },
    }
    return plane


def test_verify_shows_the_step_and_then_the_card(plane: Any, tidegate: Any) -> None:
    code, out, err = tidegate("verify", "m")
    assert code == 0
    assert "scratch replica: loading the model; 1 failed before" in err
    assert "up to 1,234 rows/s in Triton, 133 MiB, starts in 1.6 s" in out
    assert "batch    8: p50 0.50 ms, p99 2.00 ms, 1,234 rows/s" in out
    code, out, _ = tidegate("verify", "m", "--version", "2", "--json")
    assert orjson.loads(out)["card"]["cpu"] == "AMD EPYC"


def test_a_rejection_has_the_models_message_and_the_next_commands(plane: Any, tidegate: Any) -> None:
    plane.end = REJECTED
    code, out, _ = tidegate("deploy", "m", "--version", "2", "--json")
    assert code == 4
    told = orjson.loads(out)
    assert told["reason"] == "version_rejected"
    for words in ("No module named 'lightgbm'", "`tidegate verify m --version 2`", "--force`"):
        assert words in told["error"]
    assert "registry POST /v1/deploy" not in plane.seen


def test_without_an_autoscaler_the_wait_says_so_and_ends(plane: Any, tidegate: Any) -> None:
    plane.down.add("autoscaler")
    plane.end = PENDING
    code, _, err = tidegate("verify", "m", "--timeout", "0s")
    assert code == 5
    assert "the autoscaler does not answer" in err


def test_force_neither_waits_nor_asks_the_verification(plane: Any, tidegate: Any) -> None:
    def deployed(request: httpx.Request) -> httpx.Response:
        assert orjson.loads(request.content)["deployment"] == {"unverified": True}
        found = {"name": "m-v2", "version": 2, "model": "m"}
        return httpx.Response(200, json={"deployment": found, "endpoint": {"name": "m", "previous": []}})

    plane.answers["POST /v1/deploy"] = deployed
    code, _, err = tidegate("deploy", "m", "--version", "2", "--force", "--no-wait")
    assert code == 0, err
    assert f"registry GET {PATH}/verification" not in plane.seen


def test_apply_waits_for_pending_versions(plane: Any, tidegate: Any, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("kind: Deployment\nname: m-v2\nmodel: m\nversion: 2\n")
    plane.answers["POST /v1/apply"] = {"items": []}
    code, _, err = tidegate("apply", "-f", str(file))
    assert code == 0, err
    assert plane.seen.index(f"registry GET {PATH}/verification") < plane.seen.index("registry POST /v1/apply")
    plane.seen.clear()
    file.write_text(f"{file.read_text()}unverified: true\n")
    assert tidegate("apply", "-f", str(file))[0] == 0
    assert plane.seen == ["registry POST /v1/apply"]


def test_the_state_in_a_few_words() -> None:
    assert state_words({}) == "unchecked"
    assert state_words({"state": "skipped", "message": "a language model"}) == "skipped: a language model"
    assert state_words(REJECTED) == "rejected: No module named 'lightgbm'"
