"""``tidegate tune`` as a whole, on a control plane in memory; only the load itself is given."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from tidegate.cli import batching_sweep, temporary_deployment
from tidegate.client.errors import BadAnswer
from tidegate.tune.load_generator import LoadResult

pytestmark = pytest.mark.unit

SOURCE = {
    "name": "digits-v1",
    "model": "digits",
    "version": 1,
    "batching": {"max_batch": None, "window_ms": 0.0},
    "threads": 2,
    "env": {"A": "b"},
    "min_replicas": 0,
    "max_replicas": 9,
    "target_wait_ms": 100.0,
    "max_concurrency": None,
}
SIGNATURE = {
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [4]}],
    "outputs": [],
    "max_batch_size": 4,
}
VERSION = {
    "model": "digits",
    "number": 1,
    "signature": SIGNATURE,
    "metadata": {"metrics": {"accuracy": 0.98, "capacity_rps": 1.0}, "tags": {"a": "b"}, "notes": "mine"},
}
TEMPORARY = ("deployments/digits-tune", "endpoints/digits-tune")


class World:
    """The registry's temporary objects, and a replica that is replaced at once by each change."""

    def __init__(self) -> None:
        self.there: dict[str, Any] = {}
        self.batching: list[Any] = []
        self.stubborn = 0
        self.failing = ""

    def put(self, request: httpx.Request) -> httpx.Response:
        body = orjson.loads(request.read())
        self.there[request.url.path.removeprefix("/v1/")] = body
        if "batching" in body:
            self.batching.append(body["batching"])
        return httpx.Response(201, json=body)

    def patch(self, request: httpx.Request) -> httpx.Response:
        self.batching.append(orjson.loads(request.read())["batching"])
        return httpx.Response(200, json={})

    def get(self, request: httpx.Request) -> httpx.Response:
        if request.url.port == 8030:  # the autoscaler
            return httpx.Response(200, json=self.status())
        found = self.there.get(request.url.path.removeprefix("/v1/"))
        return httpx.Response(200 if found else 404, json=found or {"error": "no", "reason": "not_found"})

    def delete(self, request: httpx.Request) -> httpx.Response:
        if self.stubborn:
            self.stubborn -= 1
            return httpx.Response(503, json={"error": "away", "reason": "unavailable"})
        del self.there[request.url.path.removeprefix("/v1/")]
        return httpx.Response(204)

    def status(self) -> Any:
        number = len(self.batching)
        replica = {"replica": f"digits-tune-0-{number}", "state": "ready", "batch_mean": 3.5, "host": "away"}
        told = {"type": "Loaded", "ok": not self.failing, "reason": "LoadFailed", "message": self.failing}
        return {"ready": int(not self.failing), "conditions": [{**told, "at": 9e9}], "replicas": [replica]}


@pytest.fixture
def world(plane: Any, monkeypatch: pytest.MonkeyPatch) -> World:
    found = World()
    for path in TEMPORARY:
        for method in ("put", "get", "delete"):
            plane.answers[f"{method.upper()} /v1/{path}"] = getattr(found, method)
    plane.answers |= {
        "PATCH /v1/deployments/digits-tune": found.patch,
        "GET /v2/models/digits-tune/ready": {},
        "GET /v1/deployments/digits-v1": SOURCE,
        "PATCH /v1/deployments/digits-v1": SOURCE,
        "GET /v1/endpoints/digits": {"name": "digits", "targets": [{"deployment": "digits-v1"}]},
        "GET /v1/models/digits/versions/1": VERSION,
        "PATCH /v1/models/digits/versions/1": VERSION,
    }
    monkeypatch.setattr(temporary_deployment, "REMOVAL_PAUSE_S", 0.0)
    monkeypatch.setattr(temporary_deployment, "POLL_S", 0.0)
    return found


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, world: World) -> list[int]:
    """Bigger batches answer more, and the p99 grows with the callers."""
    seen: list[int] = []

    def measure(address: Any, request: bytes, connections: int, seconds: float) -> LoadResult:
        assert b"POST /v2/models/digits-tune/infer" in request
        seen.append(connections)
        answers = 100 * world.batching[-1]["max_batch"] * connections
        return LoadResult(answers, 0, 2.0, 1.0 * connections, 10.0 * connections)

    monkeypatch.setattr(batching_sweep, "measure", measure)
    return seen


def body_of(plane: Any, call: str) -> Any:
    return orjson.loads(plane.bodies[plane.seen.index(call)])


def test_measures_chooses_keeps_and_cleans_up(plane: Any, world: World, load: list[int], tidegate: Any):
    code, out, err = tidegate("tune", "digits", "--window-ms", "0", "-c", "1", "-c", "8", "--json")
    assert code == 0, err
    found = orjson.loads(out)
    assert world.batching == [{"max_batch": size, "window_ms": 0.0} for size in (1, 2, 4)]
    assert load == [1, 8] * 3
    assert len(found["points"]) == 6
    assert found["latency_ms"] == 100.0
    assert found["chosen"]["max_batch"] == 4
    assert found["chosen"]["connections"] == 8
    assert found["chosen"]["rps"] == 1600.0
    assert found["chosen"]["batch_mean"] == 3.5
    assert [p["chosen"] for p in found["points"]].count(True) == 1
    assert found["applied"] is False
    assert Path(found["png"]).name == "digits-tune.png"
    assert Path("digits-tune.png").read_bytes().startswith(b"\x89PNG")
    kept = body_of(plane, "registry PATCH /v1/models/digits/versions/1")["metadata"]
    assert kept["metrics"] == {
        "accuracy": 0.98,
        "capacity_rps": 1600.0,
        "capacity_p99_ms": 80.0,
        "capacity_max_batch": 4.0,
        "capacity_window_ms": 0.0,
    }
    assert (kept["tags"], kept["notes"]) == ({"a": "b"}, "mine")
    made = body_of(plane, "registry PUT /v1/deployments/digits-tune")
    assert (made["min_replicas"], made["max_replicas"], made["threads"]) == (1, 1, 2)
    assert "registry PATCH /v1/deployments/digits-v1" not in plane.seen
    assert not world.there


def test_table_and_apply(plane: Any, world: World, load: list[int], tidegate: Any):
    code, out, err = tidegate("tune", "digits", "--max-batch", "2", "-c", "1", "--apply", "--png", "a.png")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].split()[:2] == ["MAX", "BATCH"]
    assert lines[1].split() == ["2", "0", "1", "100", "1", "10", "3.5", "chosen"]
    assert "digits-v1 now has this batching." in out
    assert body_of(plane, "registry PATCH /v1/deployments/digits-v1") == {
        "batching": {"max_batch": 2, "window_ms": 0.0}
    }
    assert "batch 2: running (1 of 3: 1 connection)" in err
    assert Path("a.png").exists()


def test_nothing_keeps_to_the_latency(plane: Any, world: World, load: list[int], tidegate: Any):
    code, out, err = tidegate("tune", "digits", "--latency-ms", "5", "--apply", "-c", "1", "--json")
    assert code == 1
    assert orjson.loads(out)["chosen"] is None
    assert "the lowest was 10 ms" in err
    assert "registry PATCH /v1/models/digits/versions/1" not in plane.seen
    assert "registry PATCH /v1/deployments/digits-v1" not in plane.seen
    assert not world.there


def test_out_of_time(world: World, load: list[int], tidegate: Any):
    code, _, err = tidegate("tune", "digits", "--limit", "0s", "-c", "8")
    assert code == 0
    assert load == [8], "one setting is measured in any case"
    assert "6 settings were not measured" in err


@pytest.mark.parametrize("error", [KeyboardInterrupt(), BadAnswer("no figures"), signal.SIGTERM])
def test_taken_away_after_any_end(
    world: World, load: list[int], tidegate: Any, monkeypatch: pytest.MonkeyPatch, error: Any
):
    def end(*_: Any) -> LoadResult:
        assert len(world.there) == 2
        if isinstance(error, signal.Signals):
            signal.raise_signal(error)
        raise error

    monkeypatch.setattr(batching_sweep, "measure", end)
    world.stubborn = 2
    before = signal.getsignal(signal.SIGTERM)
    code, _, _ = tidegate("tune", "digits")
    assert code == (1 if isinstance(error, BadAnswer) else 130)
    assert not world.there
    assert signal.getsignal(signal.SIGTERM) is before


def test_says_how_to_remove_what_could_not_be(world: World, load: list[int], tidegate: Any):
    world.stubborn = 1000
    code, _, err = tidegate("tune", "digits", "--max-batch", "1", "-c", "1")
    assert code == 0
    assert "tidegate delete digits-tune --endpoint --yes && tidegate delete digits-tune --deployment" in err


def test_a_model_that_does_not_load(world: World, load: list[int], tidegate: Any):
    world.failing = "no such file"
    code, _, err = tidegate("tune", "digits")
    assert code == 4
    assert "no such file" in err
    assert not world.there


def test_refusals(plane: Any, world: World, load: list[int], tidegate: Any):
    assert tidegate("tune", "nobody")[0] == 3
    assert tidegate("tune", "digits", "--png", "nowhere/a.png")[0] == 2
    assert tidegate("tune", "digits", "--png", "a.svg")[0] == 2
    assert tidegate("tune", "digits", "--data", '{"y": [["a"]]}', "--file", "x.json")[0] == 2
    assert tidegate("tune", "digits", "--data", '[["a"]]')[0] == 2
    code, _, err = tidegate("tune", "digits", "--data", "[[1,2,3,4],[1,2,3,4],[1,2,3,4],[1,2,3,4],[1,2,3,4]]")
    assert code == 2
    assert "5 rows, but the model accepts at most 4" in err
    streams = {**SIGNATURE, "decoupled": True}
    plane.answers["GET /v1/models/digits/versions/1"] = {**VERSION, "signature": streams}
    assert "decoupled" in tidegate("tune", "digits")[2]
    assert not any(call.startswith("registry PUT") for call in plane.seen)


def test_what_is_there_is_not_touched(plane: Any, world: World, load: list[int], tidegate: Any):
    world.there[TEMPORARY[0]] = {"name": "digits-tune"}
    code, _, err = tidegate("tune", "digits")
    assert code == 7
    assert "tidegate delete digits-tune --deployment --yes" in err
    assert world.there == {TEMPORARY[0]: {"name": "digits-tune"}}


def test_names_stay_within_their_limit():
    assert temporary_deployment.name_for("digits") == "digits-tune"
    assert temporary_deployment.name_for("a" * 63) == "a" * 58 + "-tune"
    assert temporary_deployment.name_for("a" * 57 + "-bcdef") == "a" * 57 + "-tune"
