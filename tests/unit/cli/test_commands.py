"""Whole commands against a control plane in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

DEPLOYMENT = {"name": "digits-v1", "model": "digits", "version": 1}
ENDPOINT = {"name": "digits", "targets": [{"deployment": "digits-v1", "weight": 100}], "previous": []}
VERSION = {
    "model": "digits",
    "number": 1,
    "format": "onnx",
    "artifact_sha256": "a" * 64,
    "artifact_size": 2048,
    "filename": "digits.onnx",
    "signature": {"inputs": [{"name": "image", "datatype": "FP32", "shape": [64]}], "outputs": []},
    "metadata": {"metrics": {"accuracy": 0.98}, "tags": {}, "notes": ""},
    "created_at": "2024-05-31T10:00:00+00:00",
}


def condition(kind: str, ok: bool, reason: str, message: str = "", at: float = 0.0) -> dict[str, Any]:
    return {"type": kind, "ok": ok, "reason": reason, "message": message, "at": at}


def status_of(*conditions: dict[str, Any], ready: int = 1) -> dict[str, Any]:
    return {
        "deployment": "digits-v1",
        "desired": 1,
        "ready": ready,
        "starting": 0,
        "draining": 0,
        "queue": 0,
        "arrival_rate": None,
        "conditions": list(conditions),
    }


READY = status_of(condition("Ready", True, "Ready"))


@pytest.fixture
def deployable(plane: Any) -> Any:
    """A control plane on which a deploy of digits succeeds."""
    plane.answers |= {
        "PUT /v1/artifacts": {"sha256": "a" * 64, "size": 5},
        "POST /v1/models/digits/versions": VERSION,
        "PATCH /v1/models/digits/versions/1": VERSION,
        "POST /v1/deploy": {"deployment": DEPLOYMENT, "endpoint": ENDPOINT},
        "GET /v1/deployments/digits-v1": READY,
        "GET /v1/endpoints/digits": ENDPOINT,
        "GET /v2/models/digits/ready": {},
    }
    return plane


def body_of(plane: Any, call: str) -> Any:
    return orjson.loads(plane.bodies[plane.seen.index(call)])


def test_deploy(deployable: Any, tidegate: Any, tmp_path: Path) -> None:
    (tmp_path / "digits.onnx").write_bytes(b"model")
    code, out, err = tidegate(
        *("deploy", "digits.onnx", "--min", "0", "--max", "3", "--scale-to-zero-after", "5m"),
        *("--max-batch", "8", "--env", "A=b=c", "--metric", "accuracy=0.98", "--trained-at", "2024-05-31"),
        *("--note", "hello", "--json"),
    )
    assert code == 0, err
    document = orjson.loads(out)
    assert document["version"]["number"] == 1
    assert document["status"]["ready"] == 1
    assert deployable.bodies[deployable.seen.index("registry PUT /v1/artifacts")] == b"model"
    version = body_of(deployable, "registry POST /v1/models/digits/versions")
    assert version["metadata"]["metrics"] == {"accuracy": 0.98}
    assert version["metadata"]["trained_at"].startswith("2024-05-31T00:00:00")
    assert version["filename"] == "digits.onnx"
    assert body_of(deployable, "registry POST /v1/deploy") == {
        "model": "digits",
        "version": 1,
        "endpoint": "digits",
        "deployment": {
            "min_replicas": 0,
            "max_replicas": 3,
            "scale_to_zero_after_s": 300.0,
            "batching": {"max_batch": 8},
            "env": {"A": "b=c"},
        },
    }
    assert "upload: done (digits.onnx, 5 B)" in err


def test_deploy_says_new_things_of_a_known_version(deployable: Any, tidegate: Any, tmp_path: Path) -> None:
    (tmp_path / "digits.onnx").write_bytes(b"model")
    assert tidegate("deploy", "digits.onnx", "--metric", "accuracy=0.98")[0] == 0
    patch = "registry PATCH /v1/models/digits/versions/1"
    assert patch not in deployable.seen
    assert tidegate("deploy", "digits.onnx", "--note", "new")[0] == 0
    assert body_of(deployable, patch)["metadata"]["notes"] == "new"
    assert body_of(deployable, patch)["metadata"]["metrics"] == {"accuracy": 0.98}


@pytest.mark.parametrize(
    ("file", "content", "options", "words"),
    [
        ("m.onnx", b"m", ("--name", "a b"), "use 1 to 63 letters"),
        ("m.onnx", b"m", ("--min", "5", "--max", "2"), "--min 5 is above --max 2"),
        ("model.py", b"class TritonPythonModel: ...", (), "Give --signature FILE.json"),
        ("m.pt", b"m", (), "Give --signature FILE.json"),
        ("m.onnx", b"m", ("--requirements", "none.txt"), "none.txt: No such file"),
        ("m.onnx", b"m", ("--signature", "none.json"), "none.json: No such file"),
        ("m.onnx", b"m", ("--max-loss", "1%"), "Add --precision auto or int8"),
    ],
)
def test_deploy_refuses_before_it_calls_anything(
    plane: Any, tidegate: Any, tmp_path: Path, file: str, content: bytes, options: Any, words: str
) -> None:
    (tmp_path / file).write_bytes(content)
    code, _, err = tidegate("deploy", file, *options)
    assert (code, plane.seen) == (2, [])
    assert words in " ".join(err.split())


@pytest.mark.parametrize(("status", "code"), [(400, 1), (403, 1), (409, 7), (413, 1)])
def test_what_the_registry_refuses_is_refused_before_the_upload(
    deployable: Any, tidegate: Any, tmp_path: Path, status: int, code: int
) -> None:
    (tmp_path / "digits.onnx").write_bytes(b"model")
    said = {"error": "Not like this.", "reason": "r", "request_id": "i"}
    deployable.answers["POST /v1/models/digits/check"] = lambda _: httpx.Response(status, json=said)
    found, _, err = tidegate("deploy", "digits.onnx", "--min", "2", "--breaking")
    assert found == code
    assert "Not like this." in err
    assert deployable.seen == ["registry POST /v1/models/digits/check"]
    asked = orjson.loads(deployable.bodies[0])
    assert (asked["size"], asked["filename"], asked["breaking"]) == (5, "digits.onnx", True)
    assert asked["deployment"] == {"min_replicas": 2}


def test_warnings_of_the_registry_are_shown_once(deployable: Any, tidegate: Any, tmp_path: Path) -> None:
    (tmp_path / "digits.onnx").write_bytes(b"model")
    told = {"warnings": ["Saved with another release."]}
    deployable.answers["POST /v1/models/digits/check"] = {"format": "onnx", **told}
    deployable.answers["POST /v1/models/digits/versions"] = VERSION | told
    _, _, err = tidegate("deploy", "digits.onnx")
    assert err.count("Warning: Saved with another release.") == 1


def test_a_deploy_that_another_one_overtook_does_not_claim_to_serve(
    deployable: Any, tidegate: Any, tmp_path: Path
) -> None:
    (tmp_path / "digits.onnx").write_bytes(b"model")
    taken = {"name": "digits", "targets": [{"deployment": "digits-v2", "weight": 100}], "previous": []}
    deployable.answers["GET /v1/endpoints/digits"] = taken
    code, out, err = tidegate("deploy", "digits.onnx")
    assert (code, out) == (7, "")
    assert "digits-v1 is registered but gets no traffic" in err
    assert "pointed endpoint digits to digits-v2" in err


def test_deploy_of_known_bytes_uploads_nothing(deployable: Any, tidegate: Any, tmp_path: Path) -> None:
    (tmp_path / "digits.onnx").write_bytes(b"model")
    digest = "9372c470eeadd5ecd9c3c74c2b3cb633f8e2f2fad799250a0f70d652b6b825e4"
    deployable.answers[f"HEAD /v1/artifacts/{digest}"] = lambda _: httpx.Response(200)
    code, out, err = tidegate("deploy", "digits.onnx", "--no-wait")
    assert code == 0
    assert "registry PUT /v1/artifacts" not in deployable.seen
    assert "was there already" in err
    assert "is starting as digits-v1" in out


def test_deploy_tells_what_triton_said(deployable: Any, tidegate: Any, tmp_path: Path) -> None:
    (tmp_path / "digits.onnx").write_bytes(b"model")
    told = "failed to load 'digits': Invalid protobuf"
    deployable.answers["GET /v1/deployments/digits-v1"] = status_of(
        condition("Loaded", False, "LoadFailed", told, at=9e9), ready=0
    )
    code, out, err = tidegate("deploy", "digits.onnx")
    assert code == 4
    assert "\nTidegate keeps trying. Stop it: tidegate delete digits\n" in err
    assert out == ""
    assert told in err


def test_deploy_gives_up(deployable: Any, tidegate: Any, tmp_path: Path) -> None:
    (tmp_path / "digits.onnx").write_bytes(b"model")
    starting = condition("Ready", False, "Starting", "0 of 1 ready, 1 starting")
    deployable.answers["GET /v1/deployments/digits-v1"] = status_of(starting, ready=0)
    code, _, err = tidegate("deploy", "digits.onnx", "--timeout", "0s")
    assert code == 5
    assert "0 of 1 ready, 1 starting" in err


def test_a_service_that_is_away(plane: Any, tidegate: Any) -> None:
    plane.down = {"registry"}
    code, out, err = tidegate("models", "--json")
    assert code == 6
    assert err == (
        "Error: The registry does not answer at http://127.0.0.1:8010. See what runs: tidegate status. "
        "Start the stack: tidegate up.\n"
    )
    assert orjson.loads(out)["reason"] == "unreachable"


def test_without_a_token(plane: Any, tidegate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIDEGATE_SERVICE_TOKEN")
    code, _, err = tidegate("models")
    assert code == 6
    assert "No stack in this folder. Go to the folder of `make up`, or set TIDEGATE_STATE_DIR" in err


def test_models_and_versions(plane: Any, tidegate: Any) -> None:
    plane.answers |= {
        "GET /v1/models": {"items": [{"name": "digits", "versions": [1], "latest": VERSION}]},
        "GET /v1/deployments": {"items": [DEPLOYMENT]},
        "GET /v1/endpoints": {"items": [ENDPOINT]},
        "GET /v1/models/digits/versions": {"items": [VERSION]},
    }
    code, out, _ = tidegate("models")
    assert code == 0
    head, row = out.splitlines()
    assert head.split() == ["MODEL", "LATEST", "FORMAT", "REGISTERED", "ALIASES", "ENDPOINTS"]
    assert row.split()[0:3] == ["digits", "1", "onnx"]
    assert row.split()[-1] == "digits"
    code, out, _ = tidegate("versions", "digits", "--json")
    assert orjson.loads(out) == {"items": [VERSION]}
    assert "accuracy=0.98" in tidegate("versions", "digits")[1]
    assert tidegate("versions", "other")[0] == 3


def test_scale_an_endpoint_and_back(plane: Any, tidegate: Any) -> None:
    plane.answers |= {
        "GET /v1/endpoints/digits": ENDPOINT,
        "PUT /v1/deployments/digits-v1/replicas": {"held_by": "registry"},
        "DELETE /v1/deployments/digits-v1/replicas": {"held_by": "registry"},
    }
    code, out, _ = tidegate("scale", "digits", "3", "--ttl", "2h")
    assert (code, out) == (0, "digits-v1 is held at 3 replicas for 2h\n")
    assert orjson.loads(plane.bodies[-1]) == {"replicas": 3, "ttl_s": 7200.0}
    assert tidegate("scale", "digits", "--auto")[1] == "digits-v1 scales by its load again\n"


def test_scale_works_while_the_registry_is_away(plane: Any, tidegate: Any) -> None:
    plane.down = {"registry"}
    plane.answers["PUT /v1/deployments/digits-v1/replicas"] = {"held_by": "autoscaler"}
    assert tidegate("scale", "digits-v1", "2")[0] == 0


def test_scale_of_a_split_endpoint_asks_which(plane: Any, tidegate: Any) -> None:
    targets = [{"deployment": "a", "weight": 90}, {"deployment": "b", "weight": 10}]
    plane.answers["GET /v1/endpoints/digits"] = {**ENDPOINT, "targets": targets}
    code, _, err = tidegate("scale", "digits", "2")
    assert code == 1
    assert "Name one of them: a, b" in err


def test_apply(plane: Any, tidegate: Any, tmp_path: Path) -> None:
    (tmp_path / "all.yaml").write_text(
        "kind: Deployment\nname: d\nmodel: m\nversion: 1\n---\n"
        "kind: Endpoint\nname: e\ntargets: [{deployment: d}]\n"
    )
    plane.answers["POST /v1/apply"] = {
        "revision": 3,
        "items": [
            {"kind": "deployment", "name": "d", "action": "created"},
            {"kind": "endpoint", "name": "e", "action": "unchanged"},
        ],
    }
    code, out, _ = tidegate("apply", "-f", "all.yaml")
    assert code == 0
    assert [line.split() for line in out.splitlines()[1:]] == [
        ["deployment", "d", "created"],
        ["endpoint", "e", "unchanged"],
    ]
    assert orjson.loads(plane.bodies[-1]) == {
        "deployments": [{"name": "d", "model": "m", "version": 1}],
        "endpoints": [{"name": "e", "targets": [{"deployment": "d"}]}],
    }


def test_a_dry_run_of_apply_shows_the_changed_fields(plane: Any, tidegate: Any, tmp_path: Path) -> None:
    (tmp_path / "all.yaml").write_text("kind: Deployment\nname: d\nmodel: m\nversion: 1\n")
    changes = [
        {"field": "max_replicas", "before": 1, "after": 3},
        {"field": "batching.window_ms", "before": 2.0, "after": None},
        {"field": "env.A", "before": "(hidden)", "after": "(hidden, changed)"},
    ]
    item = {"kind": "deployment", "name": "d", "action": "updated", "changes": changes}
    plane.answers["POST /v1/apply/dry-run"] = {"revision": 3, "items": [item]}
    code, out, err = tidegate("apply", "-f", "all.yaml", "--dry-run")
    assert code == 0
    assert out.splitlines()[2:] == [
        "deployment d: max_replicas: 1 -> 3",
        "deployment d: batching.window_ms: 2.0 -> none",
        'deployment d: env.A: "(hidden)" -> "(hidden, changed)"',
    ]
    assert "nothing was changed" in err
    assert "registry POST /v1/apply" not in plane.seen


def test_apply_deletes_only_with_prune_and_asks_first(plane: Any, tidegate: Any, tmp_path: Path) -> None:
    (tmp_path / "all.yaml").write_text("kind: Deployment\nname: d\nmodel: m\nversion: 1\n")
    answer: dict[str, Any] = {
        "revision": 3,
        "items": [
            {"kind": "deployment", "name": "d", "action": "unchanged"},
            {"kind": "endpoint", "name": "old", "action": "deleted"},
            {"kind": "deployment", "name": "spare", "action": "kept", "reason": "still used by Endpoint 'e'"},
        ],
    }
    plane.answers |= {"POST /v1/apply": answer, "POST /v1/apply/dry-run": answer}
    code, _, err = tidegate("apply", "-f", "all.yaml", "--prune")
    assert code == 2
    assert "This deletes endpoint old. To confirm without a terminal, repeat the command with --yes" in err
    assert "registry POST /v1/apply" not in plane.seen
    code, out, _ = tidegate("apply", "-f", "all.yaml", "--prune", "--yes")
    assert code == 0
    assert out.splitlines()[-1] == "deployment spare: kept: still used by Endpoint 'e'"
    assert orjson.loads(plane.bodies[-1]) == {
        "deployments": [{"name": "d", "model": "m", "version": 1}],
        "endpoints": [],
        "prune": True,
    }
    answer["items"] = [{"kind": "deployment", "name": "d", "action": "unchanged"}]
    assert tidegate("apply", "-f", "all.yaml", "--prune")[0] == 0, "nothing to ask"
    assert orjson.loads(plane.bodies[-1])["deletions"] == [], "nothing else may be deleted"
    code, _, err = tidegate("apply", "-f", "-", "--prune")
    assert code == 2
    assert "stdin is the file" in err


def test_delete_asks_first(plane: Any, tidegate: Any) -> None:
    plane.answers |= {
        "GET /v1/models/digits": {"name": "digits"},
        "GET /v1/deployments": {"items": [DEPLOYMENT]},
        "DELETE /v1/models/digits": {"items": []},
    }
    code, _, err = tidegate("delete", "digits")
    assert code == 2
    assert "model digits with digits-v1" in err
    assert "registry DELETE /v1/models/digits" not in plane.seen
    assert tidegate("delete", "digits", "--yes")[:2] == (0, "deleted: model digits with digits-v1\n")


def test_delete_of_an_endpoint(plane: Any, tidegate: Any) -> None:
    plane.answers |= {"GET /v1/endpoints/shared": ENDPOINT, "DELETE /v1/endpoints/shared": {}}
    assert tidegate("delete", "shared", "-y")[:2] == (0, "deleted: endpoint shared\n")
    assert tidegate("delete", "nothing", "-y")[0] == 3
    assert tidegate("delete", "shared", "--endpoint", "--deployment")[0] == 2


def test_delete_of_what_is_in_use_is_refused(plane: Any, tidegate: Any) -> None:
    told = {"error": "Deployment 'digits-v1' is in use by Endpoint 'digits'.", "reason": "conflict"}
    plane.answers |= {
        "GET /v1/deployments": {"items": [DEPLOYMENT]},
        "GET /v1/models/digits/versions/1": VERSION,
        "DELETE /v1/deployments/digits-v1": lambda _: httpx.Response(409, json=told),
    }
    code, _, err = tidegate("delete", "digits", "--version", "1", "--yes")
    assert code == 7
    assert "in use by Endpoint" in err


def test_routes_replicas_decisions_cold_starts(plane: Any, tidegate: Any) -> None:
    plane.answers |= {
        "GET /v1/deployments/digits-v1": DEPLOYMENT,
        "GET /v1/routes": {
            "epoch": "e",
            "n": 4,
            "endpoints": {"digits": {"targets": ENDPOINT["targets"]}},
            "deployments": {"digits-v1": {"model": "digits", "version": 1, "ready": 1, "wakeable": True}},
        },
        "GET /v1/replicas": {"items": [{"replica": "digits-v1-0-1", "state": "ready", "message": ""}]},
        "GET /v1/decisions": {
            "items": [
                {
                    "at": 1.0,
                    "before": 0,
                    "after": 1,
                    "rule": "minimum",
                    "actions": ["launch"],
                    "reason": "why",
                }
            ]
        },
        "GET /v1/deployments/digits-v1/cold-starts": {
            "items": [
                {"replica": "digits-v1-0-1", "at": 1.0, "total_ms": 4321.4, "phases_ms": {"load": 99.6}}
            ]
        },
    }
    assert "digits-v1" in tidegate("routes")[1]
    assert "digits-v1-0-1" in tidegate("replicas")[1]
    assert "0 -> 1" in tidegate("decisions", "digits-v1")[1]
    out = tidegate("cold-starts", "digits-v1")[1]
    assert "100" in out
    assert "4321" in out


def test_status_is_6_when_something_is_away(plane: Any, tidegate: Any) -> None:
    plane.down = {"autoscaler"}
    ready = {"status": "ready", "problems": {}}
    plane.answers |= {
        "GET /health/ready": lambda request: (
            httpx.Response(503, json={"problems": {"broker": "is not connected"}})
            if request.url.port == 8020
            else httpx.Response(200, json=ready)
        ),
        "GET /v1/endpoints": {"items": [ENDPOINT]},
        "GET /v1/deployments": {"items": [DEPLOYMENT]},
    }
    code, out, err = tidegate("status")
    assert code == 6
    states = {line.split()[0]: line for line in out.splitlines()[1:5]}
    assert "  ready  " in states["gateway"]
    assert "not ready" in states["router"]
    assert "broker: is not connected" in states["router"]
    assert "no answer" in states["autoscaler"]
    assert "The autoscaler does not answer" in err
    assert orjson.loads(tidegate("status", "--json")[1])["deployments"] is None


def test_a_wrong_setting_is_named(plane: Any, tidegate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEGATE_GATEWAY_PORT", "lots")
    code, _, err = tidegate("settings")
    assert code == 1
    assert "TIDEGATE_GATEWAY_PORT" in err
