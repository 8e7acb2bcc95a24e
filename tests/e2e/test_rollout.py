"""Rolling out with care: a smoke test first, a canary, back again, and the state as a file."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.conftest import PATIENCE_S
from tests.e2e.conftest import Stack
from tests.e2e.test_rollover import IDENTITY, variant
from tidegate import Client, ModelFailed, NoCapacity

ONE = np.ones((1, 16), np.float32)
SIGNATURE = ("--signature", f"{IDENTITY}/signature.json")


@contextmanager
def calls(stack: Stack, name: str) -> Iterator[list[float]]:
    """Call an endpoint in a loop during the block; each answer, and no call fails."""
    stop, problems, seen = threading.Event(), [], []

    def flow() -> None:
        with Client(stack.settings.gateway_url, timeout_s=PATIENCE_S) as mine:
            while not stop.is_set():
                try:
                    seen.append(float(mine.infer(name, {"x": ONE})["y"][0, 0]))
                except Exception as error:  # any of them is a gap
                    problems.append(repr(error))

    thread = threading.Thread(target=flow)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()
    assert not problems, problems[:3]
    assert seen


def sample(folder: Path, expected: float) -> str:
    request = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 16], "data": [1.0] * 16}]}
    file = folder / "sample.json"
    file.write_text(json.dumps([request, {**request, "expected": {"y": [expected] * 16}}]))
    return str(file)


@pytest.fixture(scope="module")
def two(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An endpoint whose version 2 serves and whose version 1 sleeps."""
    folder = tmp_path_factory.mktemp("two")
    for factor in (1, 2):
        stack.deploy(variant(folder, factor), "careful", *SIGNATURE)
    return "careful"


def test_a_version_that_answers_wrongly_gets_no_traffic(stack: Stack, two: str, tmp_path: Path):
    with calls(stack, two) as seen:
        done = stack.run(
            *("deploy", str(variant(tmp_path, 3)), "--name", two, *SIGNATURE),
            *("--check", sample(tmp_path, 2.0), "--json"),
        )
    assert done.returncode == 4, done.stderr
    told = json.loads(done.stdout)
    assert told["reason"] == "check_failed"
    assert "careful-v3 gave an unexpected answer to sample 2: y[0] is 3.0, expected 2.0" in told["error"]
    assert "The earlier version still serves. Version 3 stays registered" in told["error"]
    assert set(seen) == {2.0}
    state = stack.cli("export")
    assert "careful-v3" not in [each["name"] for each in state["deployments"]]
    assert not [each["name"] for each in state["endpoints"] if "-check-" in each["name"]]


def test_a_version_that_answers_serves_and_goes_back(stack: Stack, two: str, tmp_path: Path):
    with calls(stack, two) as seen:
        rolled = stack.cli("deploy", two, "--version", "3", "--check", sample(tmp_path, 3.0))
        assert rolled["version"]["number"] == 3
        back = stack.cli("rollback", two)
        assert (back["deployment"]["version"], back["replaced"]) == (2, ["careful-v3"])
        stack.run("delete", "careful-v1", "--deployment", "--yes")
        back = stack.cli("rollback", two, "--to", "1")
        assert (back["deployment"]["version"], back["remade"]) == (1, True)
    assert [value for at, value in enumerate(seen) if not at or seen[at - 1] != value] == [2.0, 3.0, 2.0, 1.0]


def test_weights_flip_while_a_version_comes_and_goes(stack: Stack, two: str):
    flips = [["v1=1", "v2=99"], ["v1=99", "v2=1"], ["v1=100"], ["v2=100"], ["v1=50", "v2=50"]]
    with calls(stack, two) as seen:
        for shares in flips:
            stack.cli("split", two, *shares)
        stack.cli("deploy", two, "--version", "3", "--no-traffic")
        stack.cli("split", two, "v1=40", "v2=30", "v3=30")
        before = len(seen)
        while len(set(seen[before:])) < 3:
            assert len(seen) < before + 3000
            time.sleep(0.01)
        for shares in flips:
            stack.cli("split", two, *shares)
        stack.cli("delete", f"{two}-v3", "--deployment", "--yes")
        gone = len(seen)
        while len(seen) < gone + 100:
            time.sleep(0.01)
        assert set(seen[gone:]) == {1.0, 2.0}
        stack.cli("split", two, "v1=1")
        end = time.monotonic() + PATIENCE_S
        while set(seen[-20:]) != {1.0}:
            assert time.monotonic() < end, seen[-20:]
            time.sleep(0.01)


def test_a_canary(stack: Stack, two: str):
    stack.cli("deploy", two, "--version", "3", "--no-traffic")
    with calls(stack, two) as seen:
        told = stack.cli("split", two, "v1=1", "v3=1")
        assert told["shares"] == {"v1": 50, "v3": 50}
        before = len(seen)
        while len(seen) < before + 100:
            assert set(seen) <= {1.0, 3.0}
    assert {1.0, 3.0} <= set(seen[before:])
    missing = stack.run("split", two, "v1=90", "v9=10")
    assert missing.returncode == 1
    assert "v9 of careful has no Deployment" in missing.stderr


def test_rules_and_sticky_keys(stack: Stack, two: str):
    stack.cli("traffic", two, "--rule", "header:X-Beta=1:v3", "--sticky", "header:X-User")
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 16], "data": [1.0] * 16}]}
    with httpx.Client(base_url=stack.settings.gateway_url, timeout=PATIENCE_S) as http:

        def answer(**headers: str) -> float:
            sent = {name.replace("_", "-"): value for name, value in headers.items()}
            return float(
                http.post(f"/v2/models/{two}/infer", json=body, headers=sent).json()["outputs"][0]["data"][0]
            )

        end = time.monotonic() + PATIENCE_S
        while {answer(X_Beta="1") for _ in range(20)} != {3.0}:
            assert time.monotonic() < end, "the rule does not arrive at the gateways"
        users = {user: answer(X_User=user) for user in map(str, range(40))}
        assert set(users.values()) == {1.0, 3.0}
        assert all(answer(X_User=user) == value for user, value in users.items())
    shown = stack.cli("traffic", two)
    assert [(each["deployment"], each["now"]) for each in shown["targets"]] == [
        ("careful-v1", 50),
        ("careful-v3", 50),
    ]
    stack.cli("traffic", two, "--no-rules", "--sticky", "none")


def test_the_state_as_a_file_is_what_apply_takes(stack: Stack, two: str, tmp_path: Path):
    file = tmp_path / "state.yaml"
    file.write_text(stack.run("export", two).stdout)
    stack.cli("apply", "-f", str(file))
    again = stack.cli("apply", "-f", str(file))
    assert {item["action"] for item in again["items"]} == {"unchanged"}
    assert stack.run("export", two).stdout == file.read_text()
    stack.cli("delete", two, "--endpoint", "--yes")
    applied = stack.cli("apply", "-f", str(file))
    assert ("endpoint", two, "created") in [(i["kind"], i["name"], i["action"]) for i in applied["items"]]
    assert stack.run("export", two).stdout == file.read_text()


def test_the_share_of_a_target_without_replicas_is_never_lost_silently(stack: Stack, two: str):
    stack.cli("split", two, "v1=1", "v3=1")
    stack.cli("scale", f"{two}-v3", "0")

    def shown() -> dict[str, str]:
        return {each["deployment"]: each["note"] for each in stack.cli("traffic", two)["targets"]}

    end = time.monotonic() + PATIENCE_S
    while "the Deployment is paused" not in shown()[f"{two}-v3"]:
        assert time.monotonic() < end, shown()
    with Client(stack.settings.gateway_url, timeout_s=PATIENCE_S, retries=0) as client:
        assert {float(client.infer(two, {"x": ONE})["y"][0, 0]) for _ in range(40)} == {1.0}
        stack.cli("traffic", two, "--when-unready", "fail")
        while "its requests fail" not in shown()[f"{two}-v3"]:
            assert time.monotonic() < end, shown()

        def outcome() -> str:
            try:
                return str(client.infer(two, {"x": ONE})["y"][0, 0])
            except NoCapacity as error:
                return error.message

        while outcome() == "1.0":
            assert time.monotonic() < end, "the gateway does not get the new policy"
        outcomes = Counter(outcome() for _ in range(200))
    stack.cli("traffic", two, "--when-unready", "wake")
    stack.cli("scale", f"{two}-v3", "--auto")
    failed = next(message for message in outcomes if message != "1.0")
    assert f"{two}-v3 has no replica" in failed
    assert outcomes.keys() == {"1.0", failed}
    assert 90 <= outcomes[failed] <= 110, "200 requests touch three blocks of 100"


FLAKY = """
import itertools

import triton_python_backend_utils as pb_utils

CALLS = itertools.count()


class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        if next(CALLS) % 2:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError("every other call fails"))
        x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
        return pb_utils.InferenceResponse([pb_utils.Tensor("y", x)])
"""


def test_a_canary_that_fails_is_rolled_back_by_itself(stack: Stack, two: str, tmp_path: Path):
    stack.cli("split", two, "v3=1")
    (tmp_path / "model.py").write_text(FLAKY)
    stack.deploy(tmp_path / "model.py", "flaky", *SIGNATURE)
    stack.cli("rollout", two, "--to", "flaky-v1", "--steps", "50,100", "--hold", "0s")
    end, failed, sent = time.monotonic() + PATIENCE_S, 0, 0
    with Client(stack.settings.gateway_url, timeout_s=PATIENCE_S) as client:

        def ask() -> None:
            nonlocal failed, sent
            sent += 1
            try:
                client.infer(two, {"x": ONE})
            except ModelFailed:
                failed += 1

        while not stack.cli("rollout", two).get("samples"):  # the router counts
            assert time.monotonic() < end
            ask()
        # Requests and shares go on without a router. The next one judges what happened meanwhile.
        router = stack.child("router")
        router.suspend()
        before, failed, sent = failed, 0, 0
        for _ in range(100):
            ask()
        assert 15 <= failed <= 35, "half of the requests go to the canary, and half of those fail"
        router.kill()
        while (shown := stack.run("rollout", two, "--json")).returncode or (
            json.loads(shown.stdout)["rollout"]["phase"] == "running"
        ):
            assert time.monotonic() < end, shown
            time.sleep(0.2)
        found = stack.cli("rollout", two)
        assert found["rollout"]["phase"] == "rolled_back", found
        assert found["rollout"]["reason"].startswith("errors: ")
        assert failed <= found["evidence"]["errors"]["canary_bad"] <= before + failed
        assert found["evidence"]["errors"]["base_bad"] == 0
        targets = stack.cli("traffic", two)["targets"]
        assert [(each["deployment"], each["share"]) for each in targets] == [("careful-v3", 100)]
        assert "rollout: flaky-v1 rolled back: errors: " in stack.run("traffic", two).stdout
        client.infer(two, {"x": ONE})
    stack.cli("rollout", two, "--to", "v1", "--steps", "1,100")
    promoted = stack.cli("promote", two)
    assert (promoted["rollout"]["phase"], promoted["rollout"]["deployment"]) == ("promoted", "careful-v1")
    stack.cli("rollout", two, "--to", "flaky-v1", "--steps", "1,100")
    back = stack.cli("rollback", two)
    assert (back["deployment"]["name"], back["replaced"]) == ("careful-v1", ["flaky-v1"])


def test_a_canary_with_worse_scores_is_rolled_back(stack: Stack, two: str):
    stack.cli("deploy", two, "--version", "3", "--no-traffic")
    options = ("--steps", "50,100", "--hold", "0s", "--metric", "score")
    stack.cli("rollout", two, "--to", "v3", *options)
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 16], "data": [1.0] * 16}]}
    end, found = time.monotonic() + PATIENCE_S, stack.cli("rollout", two)
    with httpx.Client(base_url=stack.settings.gateway_url, timeout=PATIENCE_S) as http:
        while found["rollout"]["phase"] == "running":
            assert time.monotonic() < end, found
            outcomes = []
            for _ in range(60):
                answer = http.post(f"/v2/models/{two}/infer", json=body)
                if (id_ := answer.headers.get("x-feedback-id")) is not None:
                    good = answer.json()["model_version"] == "1"
                    outcomes.append({"request_id": id_, "score": 1.0 if good else 0.2})
            if outcomes:
                assert http.post("/v1/feedback", json=outcomes).status_code == 202
            found = stack.cli("rollout", two)
    assert found["rollout"]["phase"] == "rolled_back", found
    assert found["rollout"]["reason"].startswith("quality: "), found
    quality = found["evidence"]["quality"]
    assert (quality["base_mean"], quality["canary_mean"]) == (1.0, pytest.approx(0.2))


def shadowed(stack: Stack, name: str, enough: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The report of shadow traffic, once it satisfies a condition, and all copies are answered and compared.

    An answer is compared after its copy has left the count of those in flight.
    """
    end = time.monotonic() + PATIENCE_S
    while True:
        found = stack.cli("shadow", name)
        report = found["report"]
        settled = report and not report["in_flight"] and report["compared"] == report["answered"]
        if settled and enough(report):
            return dict(report)
        assert time.monotonic() < end, found
        time.sleep(0.2)


# Seconds between two reports of a gateway, by default.
REPORT_S = 0.5


def counted(stack: Stack, name: str) -> float:
    """The answered requests of an endpoint, by the gateway's metrics. Nothing else has failed."""
    page = httpx.get(f"{stack.settings.gateway_url}/metrics").raise_for_status().text
    found = [line for line in page.splitlines() if line.startswith("tidegate_gateway_requests_total{")]
    return sum(float(line.rpartition(" ")[2]) for line in found if f'model="{name}",outcome="ok"' in line)


def settled_count(stack: Stack, name: str) -> float:
    """The same, after the gateway has added what it collects between two reports."""
    found = counted(stack, name)
    while True:
        time.sleep(3 * REPORT_S)
        before, found = found, counted(stack, name)
        if found == before:
            return found


ASLEEP = """
kind: Deployment
name: careful-asleep
model: careful
version: 3
min_replicas: 0
scale_to_zero_after_s: 1
"""


def test_a_shadow_is_compared_and_never_disturbs_the_primary(stack: Stack, two: str, tmp_path: Path):
    """Version 1 returns its input. Version 3 returns three times its input, which is equal only for 0."""
    (tmp_path / "asleep.yaml").write_text(ASLEEP)
    stack.cli("apply", "-f", str(tmp_path / "asleep.yaml"))
    end = time.monotonic() + PATIENCE_S
    while stack.replicas("careful-asleep") or not any(
        each["deployment"] == "careful-asleep" and each["desired"] == 0
        for each in stack.autoscaler("/v1/deployments")["items"]
    ):
        assert time.monotonic() < end, "it does not go to sleep"
        time.sleep(0.2)
    assert stack.cli("traffic", two)["targets"][0]["deployment"] == "careful-v1"
    letters, before, sent = stack.cli("dead"), settled_count(stack, two), 0

    def send(client: Client, value: float, count: int = 30) -> bool:
        nonlocal sent
        for _ in range(count):
            assert client.infer(two, {"x": ONE * value})["y"][0, 0] == value
        sent += count
        return True

    with Client(stack.settings.gateway_url, timeout_s=PATIENCE_S) as client:
        stack.cli("rollout", two, "--to", "careful-asleep", "--shadow")
        asleep = shadowed(stack, two, lambda report: send(client, 0.0, 1) and report["offered"] > 1)
        assert set(asleep["refused"]) == {"no ready replica"}
        assert (asleep["copied"], stack.replicas("careful-asleep")) == (0, [])

        # On a busy machine, more than a second can pass between two copies.
        stack.cli("policy", "careful-asleep", "--set", "scale_to_zero_after_s=600")
        stack.cli("rollout", two, "--to", "careful-asleep", "--shadow", "--wake")
        shadowed(stack, two, lambda report: send(client, 0.0, 1) and report["answered"])
        send(client, 0.0)
        zeros = shadowed(stack, two, lambda report: report["compared"] > 20 or not send(client, 0.0, 5))
        assert zeros["agreed"] == zeros["compared"] == zeros["answered"]
        assert zeros["copied"] == zeros["answered"] + sum(zeros["failed"].values())
        sent_zeros = sent
        both = shadowed(
            stack, two, lambda report: report["compared"] - report["agreed"] > 20 or not send(client, 2.0, 5)
        )
        assert zeros["agreed"] <= both["agreed"] <= sent_zeros  # the first report may lag behind
        assert both["compared"] - both["agreed"] <= sent - sent_zeros
        assert both["outputs"]["y"]["max_abs"] == 4.0
        assert both["outputs"]["y"]["top1"] == 1.0
        assert both["differing"][-1]["difference"] == "16 of 16 values differ, at most by 4 (element 0)"
        assert both["latency_ms"]["shadow_call"]["p50"] > 0

        stack.worker("careful-asleep").kill()
        send(client, 1.0)
        stack.cli("rollout", two, "--to", "flaky-v1", "--shadow", "--tolerance", "1e-3")
        failing = shadowed(stack, two, lambda report: send(client, 1.0) and report["answered"] > 20)
        assert failing["failed"]["model_failed"] > 0
        assert failing["agreed"] == failing["compared"]
        assert "every other call fails" in failing["last_failure"]
        assert failing["verdict"] == "fails"
    assert stack.cli("dead") == letters
    assert settled_count(stack, two) == before + sent, "copies are no requests"
    shown = stack.run("traffic", two)
    assert "shadow: flaky-v1 gets 100% copies: fails" in shown.stdout
    with Client(stack.settings.gateway_url, api_key=stack.settings.service_token) as operator:
        assert operator.shadow(two)["report"]["verdict"] == "fails"
        assert operator.stop_shadow(two)["shadow"] is None
        assert operator.start_shadow(two, "flaky-v1", rate=5)["shadow"]["rate"] == 5
    promoted = stack.cli("promote", two)
    assert (promoted["promoted"], promoted["shadow"]) == ("flaky-v1", None)
    assert stack.cli("traffic", two)["targets"][0]["deployment"] == "flaky-v1"
    stack.cli("split", two, "careful-v1=1")
    stack.cli("rollout", two, "--to", "flaky-v1", "--shadow", "--for", "1s")
    end = time.monotonic() + PATIENCE_S
    while stack.cli("shadow", two)["shadow"] is not None:
        assert time.monotonic() < end, "the shadow does not end at its time"
        time.sleep(0.2)
    assert stack.cli("export", two)["endpoints"][0].get("shadow") is None


def test_requests_wait_in_the_queue_while_versions_are_swapped(stack: Stack, two: str):
    with calls(stack, two) as seen:
        swapped = stack.cli("rollout", two, "--to", "v2", "--swap")
        assert swapped["rollout"]["phase"] == "promoted"
        end = time.monotonic() + PATIENCE_S
        while not (seen and seen[-1] == 2.0):
            assert time.monotonic() < end, seen[-5:]
            time.sleep(0.05)
    assert [value for at, value in enumerate(seen) if not at or seen[at - 1] != value] == [1.0, 2.0]


def users(stack: Stack, name: str, begin: int, end: int) -> list[dict[str, object]]:
    """Send a request for each user, and return feedback: the answer itself is the score."""
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 16], "data": [1.0] * 16}]}
    found: list[dict[str, object]] = []
    with httpx.Client(base_url=stack.settings.gateway_url, timeout=PATIENCE_S) as http:
        for user in range(begin, end):
            answer = http.post(f"/v2/models/{name}/infer", json=body, headers={"X-Unit-Id": f"user-{user}"})
            if id_ := answer.raise_for_status().headers.get("x-feedback-id"):
                score = answer.json()["outputs"][0]["data"][0]
                found.append({"request_id": id_, "score": score + user % 7 / 10})
    return found


def test_an_experiment_counts_each_outcome_once(stack: Stack, two: str, tmp_path: Path):
    """Version 1 answers with 1 and version 2 with 2. Feedback is accepted while the router is away."""
    stack.cli("split", two, "v1=1")
    while stack.cli("traffic", two)["targets"][0]["now"] != 100:
        time.sleep(0.2)
    stack.cli("rollout", two, "--to", "v2", "--ab", "--metric", "score:5%", "--metric", "errors")
    assert "running experiment" in stack.run("rollout", two, "--to", "careful-v2").stderr
    end = time.monotonic() + PATIENCE_S
    while not users(stack, two, 0, 1):
        assert time.monotonic() < end, "answers get no id for feedback"
        time.sleep(0.2)

    def report(outcomes: int) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE_S
        while True:
            shown = stack.run("experiment", two, "--json")  # fails while the router is away
            found = json.loads(shown.stdout) if shown.returncode == 0 else {"metrics": []}
            score = found["metrics"][0]["variants"] if found["metrics"] else []
            if sum(each["outcomes"] for each in score) >= outcomes:
                return dict(found)
            assert time.monotonic() < end, found
            time.sleep(0.2)

    first, second = users(stack, two, 1, 251), users(stack, two, 251, 451)
    assert users(stack, two, 1, 20) != first[:19], "another request of a user has another id"
    with Client(stack.settings.gateway_url, timeout_s=PATIENCE_S) as client:
        assert {each["status"] for each in client.feedback_many(first)} == {"accepted"}
        before = report(250)
        router = stack.child("router")
        router.suspend()
        assert {each["status"] for each in client.feedback_many(second)} == {"accepted"}
        assert {each["status"] for each in client.feedback_many(first)} == {"duplicate"}
        router.kill()
        result = client.infer(two, {"x": ONE})
        client.feedback(result, score=float(result["y"][0, 0]))
    found = report(451)
    control, treatment = found["metrics"][0]["variants"]
    assert control["outcomes"] + treatment["outcomes"] == 451
    assert min(control["outcomes"], treatment["outcomes"]) > 150
    assert (control["mean"], treatment["mean"]) == (pytest.approx(1.3, abs=0.1), pytest.approx(2.3, abs=0.1))
    assert treatment["comparison"]["verdict"] == "better"
    assert treatment["comparison"]["low"] > 0.9
    assert found["sample_ratio"]["over"] == "units"
    assert not found["sample_ratio"]["mismatch"]
    assert before["experiment"]["id"] == found["experiment"]["id"]

    (tmp_path / "outcomes.jsonl").write_text(json.dumps({"request_id": "fb1.other", "score": 1}) + "\n")
    refused = stack.run("feedback", "--file", str(tmp_path / "outcomes.jsonl"))
    assert (refused.returncode, "item 1: unknown" in refused.stdout) == (1, True)
    assert stack.cli("feedback", str(first[0]["request_id"]), "--reward", "1")["accepted"] == 1
    assert stack.run("experiment", two, "--csv").stdout.startswith("metric,deployment,outcomes")
    stack.run("experiment", two, "--plot", str(tmp_path / "experiment.svg"))
    assert "careful-v2 against careful-v1" in (tmp_path / "experiment.svg").read_text()
    decided = stack.cli("experiment", two, "--winner", "v2")
    assert (decided["experiment"]["phase"], decided["experiment"]["winner"]) == ("decided", "careful-v2")
    targets = stack.cli("traffic", two)["targets"]
    assert [(each["deployment"], each["share"]) for each in targets] == [("careful-v2", 100)]
