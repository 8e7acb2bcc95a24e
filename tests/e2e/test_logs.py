"""The logs of models, and the way from the id of an error to what was written about it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import PATIENCE_S
from tests.e2e.conftest import REPO, Stack

TALKER = """
import logging, os, warnings
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        print("it is loaded: größe")
        warnings.warn("old weights")
        logging.getLogger("mine").error("by logging")

    def execute(self, requests):
        answers = []
        for request in requests:
            x = pb_utils.get_input_tensor_by_name(request, "x")
            print("saw", x.as_numpy().ravel().tolist())
            if x.as_numpy().flat[0] == 13:
                raise ValueError(f"no 13 in {__file__}")
            if x.as_numpy().flat[0] == 99:
                os._exit(7)
            if x.as_numpy().flat[0] == 14:
                for line in range(60_000):
                    print(f"{line:05d} ".ljust(100, "."))
                print("after the flood")
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("y", x.as_numpy())]))
        return answers
"""
STILLBORN = """
print("before it fails")
import no_such_package


class TritonPythonModel:
    def execute(self, requests):
        return []
"""
XY = {
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [1]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [1]}],
    "max_batch_size": 8,
}


def until(found: Callable[[], Any], what: str) -> Any:
    """What ``found`` gives, as soon as that is something."""
    end = time.monotonic() + PATIENCE_S
    while not (it := found()):
        assert time.monotonic() < end, what
        time.sleep(0.2)
    return it


@pytest.fixture(scope="module")
def talker(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that prints, by its endpoint's name."""
    folder = tmp_path_factory.mktemp("talker")
    (folder / "model.py").write_text(TALKER)
    (folder / "signature.json").write_text(json.dumps(XY))
    signature = str(folder / "signature.json")
    stack.deploy(folder / "model.py", "talker", "--signature", signature, "--min", "1", "--max", "1")
    return "talker"


def ask(stack: Stack, number: int, **headers: str) -> httpx.Response:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [number]}
    url = f"{stack.settings.gateway_url}/v2/models/talker/infer"
    return httpx.post(url, json={"inputs": [tensor]}, headers=headers, timeout=60)


def lines(stack: Stack, *args: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = stack.cli("logs", *args)["lines"]
    return found


def said(found: list[dict[str, Any]]) -> list[str]:
    return [line["message"] for line in found if line.get("source") == "model"]


def test_a_model_s_prints_logging_and_warnings_show_up_at_once(stack: Stack, talker: str):
    assert ask(stack, 7).status_code == 200
    until(lambda: "saw [7.0]" in said(lines(stack, talker)), "the print of a request")
    found = lines(stack, talker, "--tail", "1000")
    printed = said(found)
    assert "it is loaded: größe" in printed
    assert any("old weights" in text for text in printed)
    assert any("by logging" in text for text in printed)
    assert {line["log"] for line in found} == {"talker-v1-0-1"}
    assert said(lines(stack, "talker-v1", "--tail", "1000")) == printed, "the deployment is it, too"
    assert lines(stack, talker, "--since", "0.0001s") == []


def test_an_unknown_name_says_few_near_ones(stack: Stack, talker: str):
    done = stack.run("logs", "talkr")
    assert done.returncode == 3
    assert "Similar names: talker" in done.stderr
    assert "rabbitmq" not in done.stderr


def test_an_error_has_no_path_and_no_traceback_and_these_are_in_the_log(stack: Stack, talker: str):
    answer = ask(stack, 13, **{"X-Request-Id": "unlucky-1"})
    assert answer.status_code == 500
    assert answer.json()["error"] == "ValueError: no 13 in .../model.py"
    assert str(stack.settings.state_path) not in answer.text
    (failed,) = until(lambda: of_request(stack, "unlucky-1", "talker-v1"), "the worker's line")
    assert failed["reason"] == "model_failed"
    assert "execute" in failed["traceback"]


def of_request(stack: Stack, id_: str, log: str) -> list[dict[str, Any]]:
    done = stack.run("logs", "--request", id_, "--json")
    found = json.loads(done.stdout).get("lines", []) if done.stdout else []
    return [line for line in found if line["log"].startswith(log)]


def test_an_id_leads_through_gateway_worker_and_router(stack: Stack, talker: str):
    """The process of the model ends with this request, so the router answers it in the end."""
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    parent = f"00-{trace}-00f067aa0ba902b7-01"
    answer = ask(stack, 99, **{"X-Request-Id": "killer-1", "traceparent": parent})
    assert answer.status_code == 500, answer.text
    assert answer.headers["x-request-id"] == "killer-1"

    def by_log(id_: str) -> dict[str, list[dict[str, Any]]]:
        done = stack.run("logs", "--request", id_, "--json")
        found = json.loads(done.stdout).get("lines", []) if done.stdout else []
        return {log: [line for line in found if line["log"] == log] for log in {x["log"] for x in found}}

    until(lambda: {"access", "router"} <= by_log("killer-1").keys(), "the lines of gateway and router")
    found = by_log("killer-1")
    (access,) = found["access"]
    assert (access["status"], access["protocol"], access["model"]) == (500, "rest", "talker")
    assert access["deployment"] == "talker-v1"
    assert access["reason"] == answer.json()["reason"]
    assert [line["message"] for line in found["router"]] == ["dead letter"]
    (worker,) = [log for log in found if log.startswith("talker-v1-0-")]
    assert found[worker][-1]["message"] == "request is given up"
    assert by_log(trace) == found, "the id of the caller's trace leads to the same lines"


def test_a_success_is_found_by_both_of_its_ids_and_so_is_a_job(stack: Stack, talker: str):
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [3]}
    url = f"{stack.settings.gateway_url}/v2/models/talker/infer"
    until(lambda: httpx.post(url, json={"inputs": [tensor]}, timeout=60).status_code == 200, "an answer")
    answer = httpx.post(url, json={"id": "my own id", "inputs": [tensor]}, timeout=60)
    for id_ in (answer.headers["x-request-id"], "my own id"):
        (line,) = until(partial(of_request, stack, id_, "access"), "the line of a success")
        assert (line["status"], line["client_id"]) == (200, "my own id")
        parts = ("decode_ms", "transit_ms", "wait_ms", "compute_ms", "encode_ms")
        assert sum(line[part] for part in parts) == pytest.approx(line["total_ms"], abs=0.01)
        assert line["received"] > 0
        assert line["sent"] > 0
    unlucky = {**tensor, "data": [13]}
    job = httpx.post(url, json={"inputs": [unlucky]}, headers={"Prefer": "respond-async"}, timeout=60).json()
    failed = until(lambda: of_request(stack, job["id"], "talker-v1"), "the worker's line of a job")
    assert failed[-1]["job"] == job["id"]
    (access,) = until(lambda: of_request(stack, job["id"], "access"), "the gateway's line of a job")
    assert (access["protocol"], access["status"]) == ("job", 202)
    assert failed[-1]["request_id"] == access["request_id"]


def test_what_is_no_request_is_found_by_the_id_of_its_answer(stack: Stack):
    at = (stack.settings.host, stack.settings.gateway_port)
    with socket.create_connection(at, timeout=PATIENCE_S) as connection:
        connection.sendall(b"NONSENSE\r\n\r\n")
        answer = connection.recv(65536).decode()
    (id_,) = re.findall(r"x-request-id: (\w+)", answer)
    (line,) = until(partial(of_request, stack, id_, "access"), "the line of what is no request")
    assert (line["status"], line["reason"]) == (400, "bad_request")


def test_what_to_do_when_nothing_is_found(stack: Stack):
    done = stack.run("logs", "--request", "no-such-id")
    assert done.returncode == 3
    assert "tidegate settings set ACCESS_LOG_SAMPLE=1" in " ".join(done.stderr.split())


@pytest.fixture
def following(stack: Stack) -> Iterator[Callable[[], str]]:
    """What ``tidegate logs talker --follow`` has shown so far."""
    command = [sys.executable, "-m", "tidegate.cli", "logs", "talker", "--follow", "--tail", "0"]
    seen = bytearray()
    with subprocess.Popen(command, env=stack.env, cwd=REPO, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)

        def shown() -> str:
            seen.extend(process.stdout.read() or b"")  # type: ignore[union-attr]
            return seen.decode()

        yield shown
        process.send_signal(signal.SIGINT)


def test_the_log_survives_its_replica_and_goes_on_with_the_next_one(
    stack: Stack, talker: str, following: Callable[[], str]
):
    def heard(number: int, log: str) -> bool:
        ask(stack, number)  # until it follows: what was written before it started is not shown
        return any(f"saw [{number}.0]" in text and log in text for text in following().splitlines())

    until(lambda: heard(1, "talker-v1-0-1"), "a line of the first replica")
    stack.worker("talker-v1").kill()
    until(lambda: heard(2, "talker-v1-0-2"), "a line of the next replica")
    logs = {line["log"] for line in lines(stack, talker, "--tail", "1000")}
    assert logs == {"talker-v1-0-1", "talker-v1-0-2"}


def test_a_failed_load_has_its_output_in_the_log(stack: Stack, tmp_path: Path):
    (tmp_path / "model.py").write_text(STILLBORN)
    (tmp_path / "signature.json").write_text(json.dumps(XY))
    stack.run("deploy", str(tmp_path / "model.py"), "--name", "stillborn", "--signature",
              str(tmp_path / "signature.json"), "--min", "1")  # fmt: skip
    try:
        until(lambda: stack.run("logs", "stillborn").returncode == 0, "a log")
        until(lambda: "before it fails" in said(lines(stack, "stillborn")), "the print of a failed load")
        until(
            lambda: [x for x in lines(stack, "stillborn") if "no_such_package" in x.get("problem", "")],
            "the reason",
        )
    finally:
        stack.cli("delete", "stillborn", "--yes")


def test_the_author_reads_a_log_from_elsewhere_with_a_key(stack: Stack, talker: str):
    made = stack.cli("keys", "create", "author", "--scope", "publish")
    other = Stack(stack.settings, stack.env | {"TIDEGATE_API_KEY": made["key"]})
    assert "it is loaded: größe" in said(lines(other, talker, "--tail", "10000"))
    done = other.run("logs", "gateway")
    assert done.returncode == 3, "services are for operators"
    assert other.run("logs", "--request", "unlucky-1").returncode not in {0, 3}


def test_a_flood_is_dropped_and_counted(stack: Stack, talker: str):
    assert ask(stack, 14).status_code == 200
    flood = 60_000 * 100

    def dropped() -> int:
        found = lines(stack, talker, "--tail", "10000")
        return sum(line.get("dropped_bytes", 0) for line in found)

    until(lambda: dropped() > flood / 3, "the count of what was dropped")
    written = sum(path.stat().st_size for path in (stack.settings.state_path / "log").glob("worker-talker*"))
    assert written < flood
