"""Commands about scaling, against a control plane in memory."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import orjson
import pytest

from tidegate.cli.exit_codes import UsageError
from tidegate.cli.replay import variation
from tidegate.cli.scaling import changes_of

ENDPOINT = {"name": "digits", "targets": [{"deployment": "digits-v1", "weight": 100}]}
AT = 1_700_000_000.0
POLICY = {
    "deployment": "digits-v1",
    "given": {
        "min_replicas": 1,
        "max_replicas": 4,
        "target_wait_ms": 200.0,
        "scaling": {"forecast": "daily"},
    },
    "effective": {"wait_ms": 200.0, "utilization": 0.8},
    "bounds": {"low": 1, "high": 3, "low_rule": "minimum", "high_rule": "cost cap"},
}
WHY = {
    "deployment": "digits-v1",
    "desired": 3,
    "rule": "cost cap",
    "reason": "40 outstanding at 20 ms each would take 4; a budget of 6 an hour pays for 3 at 2 each",
    "signals": {"demand": 40, "arrival_rate": None, "ms_per_request": 20.0},
    "needs": [{"rule": "wait", "replicas": 4, "why": "40 outstanding at 20 ms each"}],
    "policy": POLICY,
    "holds": ["after a sudden load, no replica is removed for 12 s"],
    "replicas": {"ready": 1, "starting": 2, "draining": 0},
    "ended": [{"replica": "digits-v1-0-1", "cause": "stuck", "message": "no heartbeat", "at": AT}],
    "decisions": [{"at": AT, "before": 1, "after": 3, "rule": "cost cap", "reason": "40 outstanding"}],
}


@pytest.fixture
def plane(plane: Any) -> Any:
    plane.answers |= {
        "GET /v1/deployments/digits-v1": {"name": "digits-v1"},
        "GET /v1/endpoints/digits": ENDPOINT,
        "GET /v1/deployments/digits-v1/why": WHY,
        "GET /v1/deployments/digits-v1/policy": POLICY,
        "PATCH /v1/deployments/digits-v1/policy": POLICY,
    }
    return plane


def sent(plane: Any, call: str) -> Any:
    return orjson.loads(plane.bodies[plane.seen.index(f"autoscaler {call}")])


def test_why_tells_the_whole_story(plane: Any, tidegate: Any) -> None:
    code, out, _ = tidegate("why", "digits")
    assert code == 0
    for told in (
        "digits-v1: 3 wanted (1 ready, 2 starting)",
        "cost cap: 40 outstanding at 20 ms each would take 4",
        "between 1 (minimum) and 3 (cost cap)",
        "no replica is removed for 12 s",
        "stuck: no heartbeat",
        "1 -> 3",
    ):
        assert told in out
    assert orjson.loads(tidegate("why", "digits", "--json")[1]) == WHY


def test_deployments(plane: Any, tidegate: Any) -> None:
    plane.answers["GET /v1/deployments"] = {
        "items": [
            {
                "deployment": "digits-v1", "desired": 3, "ready": 1, "starting": 2, "draining": 0,
                "limits": [1, 3], "queue": 12, "arrival_rate": 20.5, "service_rate": 50.0,
                "utilization": 0.41, "predicted_wait_ms": 240.0, "cost_per_hour": 6.0, "rule": "demand",
            }
        ]
    }  # fmt: skip
    code, out, _ = tidegate("deployments")
    assert code == 0
    assert out.splitlines()[1].split() == [
        "digits-v1", "3", "1", "2", "0", "1-3", "12", "20.5", "50", "41%", "240", "6", "demand"
    ]  # fmt: skip


def test_policy_is_shown_and_changed(plane: Any, tidegate: Any) -> None:
    code, out, _ = tidegate("policy", "digits-v1")
    assert code == 0
    assert "forecast" in out
    assert "cost cap" in out
    code, _, _ = tidegate(
        *("policy", "digits-v1", "--set", "max_replicas=8", "--set", "aggressiveness=latency"),
        *(
            "--set",
            "down_window_s=",
            "--set",
            "schedule=[{start: 0 8 * * *, end: 0 18 * * *, min_replicas: 2}]",
        ),
    )
    assert code == 0
    assert sent(plane, "PATCH /v1/deployments/digits-v1/policy") == {
        "max_replicas": 8,
        "scaling": {
            "aggressiveness": "latency",
            "down_window_s": None,
            "schedule": [{"start": "0 8 * * *", "end": "0 18 * * *", "min_replicas": 2}],
        },
    }


@pytest.mark.parametrize("wrong", ["max_replicas", "=3", "schedule=[{"])
def test_what_is_no_change(wrong: str) -> None:
    with pytest.raises(UsageError):
        changes_of([wrong])


def test_pause_and_resume(plane: Any, tidegate: Any) -> None:
    plane.answers |= {
        "POST /v1/deployments/digits-v1/pause": {"deployment": "digits-v1", "replicas": 2, "held_by": "r"},
        "POST /v1/deployments/digits-v1/resume": {
            "deployment": "digits-v1",
            "replicas": None,
            "held_by": "r",
        },
    }
    code, out, _ = tidegate("pause", "digits", "--hold", "--for", "2h")
    assert (code, out) == (0, "digits-v1 is held at 2 replicas for 2h\n")
    assert sent(plane, "POST /v1/deployments/digits-v1/pause") == {"hold": True, "ttl_s": 7200.0}
    assert tidegate("resume", "digits")[1] == "digits-v1 scales by its policy again\n"


def test_scale_for_a_while(plane: Any, tidegate: Any) -> None:
    plane.answers["PUT /v1/deployments/digits-v1/replicas"] = {}
    code, out, _ = tidegate("scale", "digits", "3", "--for", "30m")
    assert (code, out) == (0, "digits-v1 is held at 3 replicas for 30m\n")
    assert sent(plane, "PUT /v1/deployments/digits-v1/replicas") == {"replicas": 3, "ttl_s": 1800.0}
    assert tidegate("scale", "digits", "--auto", "--for", "1h")[0] == 2


def test_scale_says_what_runs_where_that_is_less(plane: Any, tidegate: Any) -> None:
    path = "PUT /v1/deployments/digits-v1/replicas"
    reason = "an operator set the replicas to 9; max_replicas is 2, so 2 run"
    plane.answers[path] = {"replicas": 9, "runs": 2, "bounded_by": "maximum", "reason": reason}
    assert tidegate("scale", "digits", "9")[1] == (
        f"digits-v1 is held at 2 replicas, not at 9: {reason}. `tidegate policy digits --set max_replicas=9` "
        "raises the maximum; `tidegate scale digits 9 --force` exceeds the limit.\n"
    )
    plane.answers[path] = {"replicas": 9, "runs": 4, "bounded_by": "host", "reason": "the host is full"}
    code, out, _ = tidegate("scale", "digits", "9", "--force")
    assert (code, out) == (0, "digits-v1 is held at 4 replicas, not at 9: the host is full.\n")
    assert orjson.loads(plane.bodies[-1]) == {"replicas": 9, "force": True}
    assert tidegate("scale", "digits", "--auto", "--force")[0] == 2


def test_drain_and_cordon(plane: Any, tidegate: Any) -> None:
    host = {"host": "machine", "cordoned": True, "drained": ["digits-v1-0-1"]}
    plane.answers |= {
        "POST /v1/replicas/digits-v1-0-1/drain": {"replica": "digits-v1-0-1", "state": "draining"},
        "GET /v1/hosts": {"items": [{"host": "machine", "replicas": 2, "cordoned_at": None}]},
        "PUT /v1/hosts/machine/cordon": host,
        "DELETE /v1/hosts/machine/cordon": {"host": "machine", "cordoned": False},
    }
    assert tidegate("drain", "digits-v1-0-1")[1] == "digits-v1-0-1 drains\n"
    assert tidegate("cordon", "machine", "--drain")[1] == "machine takes no more replicas; 1 drain\n"
    assert sent(plane, "PUT /v1/hosts/machine/cordon") == {"drain": True}
    assert tidegate("cordon", "machine", "--off")[1] == "machine takes replicas again\n"
    assert "machine" in tidegate("cordon")[1]
    assert tidegate("cordon", "--off")[0] == 2


def test_replay(plane: Any, tidegate: Any, tmp_path: Path) -> None:
    result = {
        "name": "live", "late": 12, "late_share": 0.012, "wait_p50_ms": 0.0, "wait_p95_ms": 88.0,
        "wait_p99_ms": 190.0, "expired": 0, "replica_hours": 0.31, "cost": None, "most_replicas": 4,
        "changes": 4, "reversals": 1,
    }  # fmt: skip
    plane.answers["POST /v1/replay"] = {
        "deployment": "digits-v1",
        "requests": 1000,
        "seconds": 600.0,
        "service": {"call_ms": 20.0, "batch": 1, "start_s": 2.0},
        "target_wait_ms": 200.0,
        "results": [result],
        "picture": base64.b64encode(b"PNG").decode(),
    }
    code, out, _ = tidegate(
        *("replay", "digits", "--shape", "step", "--rps", "5", "--for", "20m", "--keda"),
        *("--with", "aggressiveness=economy; max_replicas=2", "--start", "3s"),
    )
    assert code == 0
    assert "1,000 requests in 600 s" in out
    assert "12 (1.2%)" in out
    assert (tmp_path / "digits-v1-replay.png").read_bytes() == b"PNG"
    order = sent(plane, "POST /v1/replay")
    assert order["arrivals"] == {
        "kind": "synthetic", "shape": "step", "rps": 5.0, "factor": 10.0, "seconds": 1200.0
    }  # fmt: skip
    assert order["policies"] == [variation("aggressiveness=economy; max_replicas=2")]
    assert order["policies"][0]["changes"] == {"max_replicas": 2, "scaling": {"aggressiveness": "economy"}}
    assert order["others"] == ["keda"]
    unset = dict.fromkeys(("call_ms", "batch", "slots", "prompt_tokens"))
    assert order["service"] == unset | {"start_s": 3.0}
    (tmp_path / "a.csv").write_text("0\n1\n")
    assert tidegate("replay", "digits", "--file", "a.csv")[0] == 0
    assert tidegate("replay", "digits", "--file", "a.csv", "--recorded")[0] == 2
    assert tidegate("replay", "digits", "--file", "b.csv")[0] == 2


def test_replay_verifies(plane: Any, tidegate: Any) -> None:
    found = {"rounds": 90, "decisions": 4, "reproduced": 4, "since": AT, "different": [], "differences": 0}
    plane.answers["POST /v1/replay/verify"] = found
    code, out, _ = tidegate("replay", "digits", "--verify", "--for", "1h")
    assert code == 0
    assert "4 of 4 decisions reproduced, in 90 rounds of the autoscaler" in out
    plane.answers["POST /v1/replay/verify"] = {**found, "reproduced": 3, "differences": 1}
    assert tidegate("replay", "digits", "--verify")[0] == 1
