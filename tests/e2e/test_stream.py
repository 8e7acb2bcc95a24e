"""Streams: one request, many answers, from a decoupled model in the real Triton to an event each."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import pytest

from tests.conftest import PATIENCE_S, Figure
from tests.e2e.conftest import REPO, Stack

# A decoupled model that keeps a diary of what became of each request, in a folder that the request names.
DIARIST = """
import threading, time
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            threading.Thread(target=self._stream, args=(request,), daemon=True).start()

    def _stream(self, request):
        diary = pb_utils.get_input_tensor_by_name(request, "diary").as_numpy()[0].decode()
        plan = pb_utils.get_input_tensor_by_name(request, "plan").as_numpy()[0].decode()
        sender = request.get_response_sender()
        with open(diary or "/dev/null", "a") as out:
            print("begun", file=out, flush=True)
            outcome = "finished"
            for word in plan.split():
                if word.startswith("sleep="):
                    time.sleep(float(word[6:]))
                elif word == "fail":
                    sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError("as planned")))
                else:
                    said = pb_utils.Tensor("said", np.array([word], dtype=object))
                    sender.send(pb_utils.InferenceResponse([said]))
                if sender.is_cancelled():
                    outcome = "cancelled"
                    break
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            print(outcome, file=out)
"""
DIARIST_CONFIG = """
backend: "python"
model_transaction_policy { decoupled: true }
input [ { name: "diary" data_type: TYPE_STRING dims: [ 1 ] } ]
input [ { name: "plan" data_type: TYPE_STRING dims: [ 1 ] } ]
output [ { name: "said" data_type: TYPE_STRING dims: [ 1 ] } ]
instance_group [ { count: 1 kind: KIND_CPU } ]
"""


@pytest.fixture(scope="module")
def tokens(stack: Stack) -> str:
    """The example, deployed as a user does it: by its folder."""
    stack.deploy(REPO / "examples" / "python-model" / "tokens", "tokens")
    return "tokens"


@pytest.fixture(scope="module")
def diarist(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("diarist") / "diarist"
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.py").write_text(DIARIST)
    (folder / "config.pbtxt").write_text(DIARIST_CONFIG)
    stack.deploy(folder, "diarist")
    return "diarist"


@pytest.fixture
def diary(open_folder: Path) -> Path:
    # Two replicas write to it, each as a user of its own.
    found = open_folder / "diary"
    found.touch()
    found.chmod(0o666)
    return found


def url(stack: Stack, path: str) -> str:
    return f"{stack.settings.gateway_url}/v2/models/{path}"


# The usual limit of an endpoint is 30 s, which a cold start can exceed on a busy machine.
PATIENT = {"X-Request-Timeout-Ms": "120000"}


@contextmanager
def streaming(
    stack: Stack, model: str, body: dict[str, Any], **headers: str
) -> Iterator[Iterator[dict[str, Any]]]:
    """The events of a stream, read one by one."""
    with httpx.stream(
        "POST", url(stack, f"{model}/generate_stream"), json=body, headers=headers, timeout=PATIENCE_S
    ) as answer:
        if answer.status_code != 200:
            answer.read()
            raise AssertionError(f"{answer.status_code}: {answer.text}")
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield (json.loads(line.removeprefix("data: ")) for line in answer.iter_lines() if line)


def words(stack: Stack, model: str, body: dict[str, Any], **headers: str) -> list[dict[str, Any]]:
    with streaming(stack, model, body, **headers) as events:
        return list(events)


def wait_for(what: str, found, limit_s: float = PATIENCE_S) -> None:
    end = time.monotonic() + limit_s
    while not found():
        assert time.monotonic() < end, f"not within {limit_s} s: {what}"
        time.sleep(0.02)


def test_the_signature_is_known_from_the_config(stack: Stack, tokens: str):
    shown = httpx.get(url(stack, tokens), timeout=PATIENCE_S).json()
    assert [i["name"] for i in shown["inputs"]] == ["text_input", "count", "delay_ms"]


def test_words_one_after_the_other(stack: Stack, tokens: str):
    found = words(stack, tokens, {"text_input": "to be or not", "id": "seven"})
    assert [e["text_output"] for e in found] == ["to", "be", "or", "not"]
    assert {(e["id"], e["model_name"], e["model_version"]) for e in found} == {("seven", "tokens", "1")}


def test_the_first_leaves_before_the_last_is_made(stack: Stack, tokens: str):
    for delay_ms in (400, 2000, 8000):  # a busy machine needs longer words
        with streaming(stack, tokens, {"text_input": "a b c d e", "delay_ms": delay_ms}) as events:
            arrived = [(time.time(), event["made_at"]) for event in events]
        assert len(arrived) == 5
        delays = [came - made for came, made in arrived]
        assert min(delays) >= 0
        early = all(came < made for (came, _), (_, made) in itertools.pairwise(arrived))
        if early and median(delays) < 0.09 * delay_ms / 400:
            break
    assert early, "each came before the next one was made"
    assert median(delays) < 0.09 * delay_ms / 400, "they came soon after they were made"
    # All words would take 1000 s, which is longer than the client waits for one.
    with streaming(stack, tokens, {"text_input": "a", "count": 100_000, "delay_ms": 10}) as events:
        assert [next(events)["text_output"] for _ in range(5)] == ["a"] * 5


def test_a_thousand_in_order(stack: Stack, tokens: str):
    text = " ".join(str(n) for n in range(1000))
    found = words(stack, tokens, {"text_input": text})
    assert [int(event["text_output"]) for event in found] == list(range(1000))


def test_streams_run_side_by_side(stack: Stack, tokens: str):
    came: list[tuple[float, int]] = []

    def one(number: int) -> list[str]:
        found = []
        body = {"text_input": f"w{number}", "count": 3, "delay_ms": 2000}
        with streaming(stack, tokens, body) as events:
            for event in events:
                came.append((time.monotonic(), number))
                found.append(event["text_output"])
        return found

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(one, range(8)))
    assert results == [[f"w{number}"] * 3 for number in range(8)]
    order = [number for _, number in sorted(came)]
    last = {number: len(order) - order[::-1].index(number) for number in range(8)}
    assert min(last.values()) > max(order.index(number) for number in range(8)), f"interleaved: {order}"


def test_an_empty_stream(stack: Stack, tokens: str):
    assert words(stack, tokens, {"text_input": "a", "count": 0}) == []
    answer = httpx.post(
        url(stack, "tokens/generate"), json={"text_input": "a", "count": 0}, timeout=PATIENCE_S
    )
    assert (answer.status_code, answer.json()["reason"]) == (500, "model_failed")


def test_generate_is_for_one_answer(stack: Stack, tokens: str):
    one = httpx.post(
        url(stack, "tokens/versions/1/generate"), json={"text_input": "hello", "id": "1"}, timeout=PATIENCE_S
    )
    assert one.status_code == 200, one.text
    assert one.json()["text_output"] == "hello"
    assert one.json()["id"] == "1"
    parts = dict(part.strip().split(";dur=") for part in one.headers["server-timing"].split(","))
    total = float(parts.pop("total"))
    assert sum(map(float, parts.values())) == pytest.approx(total, abs=0.01)
    many = httpx.post(url(stack, "tokens/generate"), json={"text_input": "hello world"}, timeout=PATIENCE_S)
    assert many.status_code == 400
    assert "/generate_stream" in many.json()["error"]


def test_infer_of_a_decoupled_model_is_refused(stack: Stack, tokens: str):
    body = {"inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["a"]}]}
    answer = httpx.post(url(stack, "tokens/infer"), json=body, timeout=PATIENCE_S)
    assert answer.status_code == 400
    assert "/generate_stream" in answer.json()["error"]
    assert "ModelStreamInfer" in answer.json()["error"]


def test_a_model_with_one_answer_streams_it(stack: Stack, deploy_python):
    model = deploy_python("sleep", "sleep-stream")
    (event,) = words(stack, model, {"ms": 1})
    assert event["slept"] == 1
    assert (
        httpx.post(url(stack, f"{model}/generate"), json={"ms": 2}, timeout=PATIENCE_S).json()["slept"] == 2
    )
    bad = httpx.post(url(stack, f"{model}/generate_stream"), json={"ms": -1}, timeout=PATIENCE_S)
    assert bad.status_code in (400, 500)
    assert "ms must be at least 0" in bad.json()["error"]


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        (b"{", 400, "not JSON"),
        (b"[]", 400, "must be a JSON object"),
        (b"{}", 400, "missing required input(s) ['text_input']"),
        (b'{"text_input": 7}', 400, "data is not BYTES"),
        (b'{"text_input": ["a", "b"]}', 400, "2 values cannot fill the shape [1]"),
        (b'{"text_input": "a", "delay_ms": "x"}', 400, "data is not FP32"),
        (b'{"text_input": "a", "id": 7}', 400, "'id' must be a string"),
        (b'{"text_input": "a", "parameters": 7}', 400, "'parameters' must be an object"),
    ],
)
@pytest.mark.parametrize("path", ["generate", "generate_stream"])
def test_what_is_wrong_with_a_request(stack: Stack, tokens: str, path, body, status, told):
    answer = httpx.post(url(stack, f"{tokens}/{path}"), content=body, timeout=PATIENCE_S)
    assert answer.status_code == status
    assert told in answer.json()["error"]
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


def test_who_may_ask(stack: Stack, tokens: str):
    for path in ("generate", "generate_stream"):
        for header in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}):
            answer = httpx.post(
                url(stack, f"{tokens}/{path}"), json={"text_input": "a"}, headers=header, timeout=PATIENCE_S
            )
            assert answer.status_code == 403
    assert httpx.post(url(stack, "nobody/generate"), json={}, timeout=PATIENCE_S).status_code == 404


def test_an_error_after_the_start(stack: Stack, diarist: str, diary: Path):
    found = words(stack, diarist, {"diary": str(diary), "plan": "one two fail"})
    assert [e.get("said") for e in found] == ["one", "two", None]
    assert found[-1].keys() == {"error", "reason", "request_id"}
    assert (found[-1]["error"], found[-1]["reason"]) == ("as planned", "model_failed")


def test_an_error_before_the_start(stack: Stack, diarist: str, diary: Path):
    body = {"diary": str(diary), "plan": "fail"}
    answer = httpx.post(url(stack, f"{diarist}/generate_stream"), json=body, timeout=PATIENCE_S)
    assert (answer.status_code, answer.json()["error"]) == (500, "as planned")


def test_deadlines(stack: Stack, diarist: str, diary: Path):
    """The time that is given holds until the first answer, and then between two."""
    limit = {"X-Request-Timeout-Ms": "6000"}
    plan = {"diary": str(diary), "plan": "sleep=0.1 " * 1200 + "late"}
    answer = httpx.post(url(stack, f"{diarist}/generate_stream"), json=plan, headers=limit, timeout=120)
    assert (answer.status_code, answer.json()["reason"]) == (504, "deadline_passed")
    wait_for("cancelled", lambda: diary.read_text().split() == ["begun", "cancelled"])
    plan["plan"] = "one sleep=3.5 two sleep=3.5 three"
    assert len(words(stack, diarist, plan, **limit)) == 3, "longer in all, but never between two"
    plan["plan"] = "one " + "sleep=0.1 " * 1200 + "two"
    one, error = words(stack, diarist, plan, **limit)
    assert (one["said"], error["reason"]) == ("one", "deadline_passed")
    wait_for("cancelled", lambda: diary.read_text().split()[-1] == "cancelled")


def test_a_caller_that_hangs_up_cancels_the_work(stack: Stack, diarist: str, diary: Path):
    body = {"diary": str(diary), "plan": "word sleep=0.05 " * 4000}
    with streaming(stack, diarist, body) as events:
        for _ in range(3):
            next(events)
    wait_for("cancelled", lambda: diary.read_text().split() == ["begun", "cancelled"])
    body = {"diary": str(diary), "plan": "sleep=0.05 " * 4000}
    with pytest.raises(httpx.ReadTimeout):  # before its first answer
        httpx.post(url(stack, f"{diarist}/generate_stream"), json=body, timeout=5)
    wait_for("cancelled", lambda: diary.read_text().split()[2:] == ["begun", "cancelled"])
    assert words(stack, diarist, {"diary": str(diary), "plan": "well"})[0]["said"] == "well"


def test_a_worker_killed_in_the_middle(stack: Stack, diarist: str, diary: Path, figure: Figure):
    """The caller has seen a part, so it is told; and the second attempt does not run on."""
    worker = stack.worker("diarist-v1")
    body = {"diary": str(diary), "plan": "word sleep=0.1 " * 300}
    with streaming(stack, diarist, body, **PATIENT) as events:
        next(events)
        worker.kill()
        began = time.monotonic()
        rest = list(events)
    assert rest[-1]["reason"] == "unavailable", rest[-1]
    assert all("said" in event for event in rest[:-1])
    figure(f"worker killed amid a stream: its caller was told after {time.monotonic() - began:.1f} s")
    wait_for(
        "the second attempt is cancelled", lambda: diary.read_text().split()[-2:] == ["begun", "cancelled"]
    )


def test_triton_killed_in_the_middle(stack: Stack, diarist: str, diary: Path):
    wait_for("ready", lambda: [r["state"] for r in stack.replicas("diarist-v1")] == ["ready"])
    body = {"diary": str(diary), "plan": "word sleep=0.1 " * 300}
    with streaming(stack, diarist, body) as events:
        next(events)
        (triton,) = [p for p in stack.worker("diarist-v1").children() if p.name() == "tritonserver"]
        triton.kill()
        rest = list(events)
    assert rest[-1]["reason"] == "unavailable"
    assert diary.read_text().split() == ["begun"], "not begun again"


def test_a_worker_killed_before_the_first_answer(stack: Stack, diarist: str, diary: Path):
    """The caller has seen nothing: the next worker begins again, and he gets it all."""
    wait_for("ready", lambda: [r["state"] for r in stack.replicas("diarist-v1")] == ["ready"])
    worker = stack.worker("diarist-v1")
    found: list[dict[str, Any]] = []
    body = {"diary": str(diary), "plan": "sleep=8 one two"}
    asking = threading.Thread(target=lambda: found.extend(words(stack, diarist, body, **PATIENT)))
    asking.start()
    wait_for("it runs", lambda: diary.exists() and diary.read_text().split() == ["begun"])
    worker.kill()
    asking.join(PATIENCE_S)
    assert [event.get("said") for event in found] == ["one", "two"], found
    wait_for("finished", lambda: diary.read_text().split() == ["begun", "begun", "finished"])


def test_metrics(stack: Stack, tokens: str):
    words(stack, tokens, {"text_input": "a b"})
    shown = httpx.get(f"{stack.settings.gateway_url}/metrics", timeout=PATIENCE_S).text
    assert 'tidegate_gateway_chunks_total{deployment="tokens-v1"}' in shown
    assert 'tidegate_gateway_first_chunk_seconds_count{deployment="tokens-v1"}' in shown
