"""The commands about jobs and batches, against a gateway in memory."""

from __future__ import annotations

import httpx
import orjson
import pytest

from tidegate.cli import batch as batch_command

pytestmark = pytest.mark.unit

ID = "0" * 31 + "1"


def job(status="succeeded", **given):
    return {
        "id": ID,
        "status": status,
        "endpoint": "digits",
        "model": "digits",
        "version": 1,
        "deployment": "digits-v1",
        "principal": "anonymous",
        "priority": "normal",
        "attempts": 1,
        "created_at": "2024-05-31T10:00:00Z",
        "started_at": "2024-05-31T10:00:01Z",
        "finished_at": "2024-05-31T10:00:02Z" if status not in {"queued", "running"} else None,
        "expires_at": "2024-06-01T10:00:00Z",
        "worker": "digits-v1-0-1",
        "error": None,
        "timing": {"total_ms": 12.0},
        "position": None,
        "estimated_start": None,
        "webhook": None,
        "batch": None,
        "line": None,
        "retry_of": None,
        "metadata": {},
    } | given


def batch(status="completed", done=2, **counts):
    return {
        "id": ID,
        "status": status,
        "lines": 2,
        "done": done,
        "counts": {"succeeded": 2, "failed": 0, "cancelled": 0, "expired": 0} | counts,
        "finished_at": None if status == "running" else "2024-05-31T10:00:02Z",
        "urls": {"status": f"/v1/batches/{ID}", "results": f"/v1/batches/{ID}/results"},
    }


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(batch_command, "POLL_S", 0.0)


def test_the_list(plane, tidegate):
    plane.answers["GET /v1/jobs"] = {"items": [job()], "next": None}
    code, out, _ = tidegate("jobs", "--status", "succeeded")
    assert code == 0
    assert ID in out
    assert "digits-v1-0-1" in out
    code, out, _ = tidegate("jobs", "--json")
    assert orjson.loads(out)["items"][0]["id"] == ID


def test_one_job(plane, tidegate):
    error = {"reason": "model_failed", "message": "it broke"}
    plane.answers[f"GET /v1/jobs/{ID}"] = job("failed", error=error)
    code, out, _ = tidegate("job", ID)
    assert code == 0
    assert "model_failed: it broke" in out
    assert "webhook" not in out


def test_waiting_for_a_job(plane, tidegate):
    states = iter([job("running"), job("running"), job()])
    waits = []

    def answer(request):
        waits.append(request.headers.get("prefer"))
        return httpx.Response(200, json=next(states))

    plane.answers[f"GET /v1/jobs/{ID}"] = answer
    code, out, _ = tidegate("job", ID, "--wait", "--json")
    assert (code, orjson.loads(out)["status"]) == (0, "succeeded")
    assert waits == [None, "wait=20", "wait=20"]
    states = iter([job("running")])
    code, _, err = tidegate("job", ID, "--wait", "--timeout", "0")
    assert (code, "running" in err) == (5, True)


def test_its_result(plane, tidegate, tmp_path):
    plane.answers[f"GET /v1/jobs/{ID}"] = job()
    plane.answers[f"GET /v1/jobs/{ID}/result"] = {"outputs": [{"name": "y"}]}
    code, out, _ = tidegate("job", ID, "--result")
    assert (code, orjson.loads(out)) == (0, {"outputs": [{"name": "y"}]})
    code, _, _ = tidegate("job", ID, "-o", str(tmp_path / "out.json"))
    assert orjson.loads((tmp_path / "out.json").read_bytes()) == {"outputs": [{"name": "y"}]}


def test_a_result_that_is_not_there_yet(plane, tidegate):
    plane.answers[f"GET /v1/jobs/{ID}"] = job("running")
    plane.answers[f"GET /v1/jobs/{ID}/result"] = lambda _: httpx.Response(202, json=job("running"))
    code, _, err = tidegate("job", ID, "--result")
    assert (code, "running" in err) == (7, True)


def test_cancel_and_retry(plane, tidegate):
    plane.answers[f"DELETE /v1/jobs/{ID}"] = job("cancelled")
    plane.answers[f"POST /v1/jobs/{ID}/retry"] = lambda _: httpx.Response(202, json=job("queued"))
    assert "cancelled" in tidegate("job", ID, "--cancel")[1]
    assert "queued" in tidegate("job", ID, "--retry")[1]
    assert tidegate("job", ID, "--retry", "--cancel")[0] == 2
    assert tidegate("job", "f" * 32)[0] == 3


def test_a_batch_from_its_file_to_its_results(plane, tidegate, tmp_path):
    file = tmp_path / "requests.jsonl"
    file.write_bytes(b'{"inputs": []}\n' * 2)
    states = iter([batch("running", 1), batch()])
    asked = {}

    def create(request):
        asked.update(request.url.params)
        return httpx.Response(202, json=batch("running", 0))

    plane.answers |= {
        "POST /v1/batches": create,
        f"GET /v1/batches/{ID}": lambda _: httpx.Response(200, json=next(states)),
        f"GET /v1/batches/{ID}/results": lambda _: httpx.Response(200, content=b"{}\n{}\n"),
    }
    code, out, err = tidegate("batch", str(file), "--model", "digits", "--ttl", "2h", "--priority", "normal")
    assert (code, out) == (0, "{}\n{}\n")
    assert asked == {"model": "digits", "priority": "normal", "ttl_s": "7200.0"}
    assert plane.bodies[0] == b'{"inputs": []}\n' * 2
    assert "1 of 2 lines" in err
    assert "completed; 2 succeeded of 2 lines" in err


def test_a_batch_is_followed_by_its_id(plane, tidegate, tmp_path):
    out_file = tmp_path / "results.jsonl"
    plane.answers |= {
        f"GET /v1/batches/{ID}": batch(succeeded=1, failed=1),
        f"GET /v1/batches/{ID}/results": lambda _: httpx.Response(200, content=b"{}\n{}\n"),
    }
    code, out, err = tidegate("batch", ID, "-o", str(out_file), "--json")
    assert code == 1  # a line has no result
    assert orjson.loads(out)["counts"]["failed"] == 1
    assert out_file.read_bytes() == b"{}\n{}\n"
    assert "1 failed" in err


def test_a_batch_is_begun_and_left(plane, tidegate, tmp_path):
    file = tmp_path / "requests.jsonl"
    file.write_bytes(b"{}\n")
    plane.answers["POST /v1/batches"] = lambda _: httpx.Response(202, json=batch("running", 0, succeeded=0))
    code, out, _ = tidegate("batch", str(file), "--no-wait")
    assert (code, out) == (0, f"{ID}\n")


def test_a_batch_is_cancelled(plane, tidegate, tmp_path):
    plane.answers[f"DELETE /v1/batches/{ID}"] = lambda _: httpx.Response(202, json=batch("cancelling"))
    assert tidegate("batch", ID, "--cancel")[:2] == (0, f"{ID}\n")
    assert tidegate("batch", str(tmp_path / "nothing.jsonl"), "--cancel")[0] == 2
    assert tidegate("batch", str(tmp_path / "nothing.jsonl"))[0] == 2
