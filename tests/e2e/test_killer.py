"""One of 64 requests in hand kills what runs it: one dead letter, 63 right answers, and what follows."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks import Webhook

from benchmarks.deaths import MODEL as DEATHS
from benchmarks.deaths import SETTINGS, TOGETHER, Worker, under_kills, with_a_guilty_one
from benchmarks.killer import MODEL, Victim, held
from benchmarks.stack import MODELS
from tests.conftest import PATIENCE_S, Figure
from tests.e2e.conftest import REPO, Stack, processes_of, running_stack
from tests.e2e.test_resilience import wait_until


def deployed(stack: Stack, victim: str, mark: Path) -> str:
    """The killer's model, as a Deployment of its own; the name of its endpoint."""
    name = f"killer-{victim}"
    signature = str(MODEL.with_name("signature.json"))
    stack.deploy(MODEL, name, "--signature", signature, "--env", f"KILLER_MARK={mark}", "--min", "1")
    return name


def letters(stack: Stack, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = stack.cli("dead", "--deployment", f"{name}-v1")["items"]
    return found


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack whose models are not contained: in a sandbox they could not kill their worker."""
    with running_stack(
        tmp_path_factory.mktemp("killer") / "state", model_sandbox="off", alert_group_s=0
    ) as found:
        yield found


class Hooks(ThreadingHTTPServer):
    """A receiver of webhooks about alerts; ``got``: the headers and body of each."""

    def __init__(self) -> None:
        self.got: list[tuple[dict[str, str], bytes]] = []
        got = self.got

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                got.append((dict(self.headers), self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(204)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                return

        super().__init__(("127.0.0.1", 0), Handler)


@pytest.fixture(scope="module")
def hooks(stack: Stack) -> Iterator[Hooks]:
    """A receiver that gets the alerts of the stack from its beginning."""
    server = Hooks()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/alerts"
    wait_until(
        "a receiver", lambda: stack.run("alerts", "add-receiver", "ops", "--webhook", url).returncode == 0
    )
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def killed(stack: Stack, hooks: Hooks, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of which one request has killed its process, beside 63 others."""
    mark = tmp_path_factory.mktemp("marks") / "model"
    name = deployed(stack, "model", mark)
    outcome = asyncio.run(held(stack.settings.gateway_url, name, "model", mark))
    assert outcome.met, outcome.line()
    return name


def test_a_segmentation_fault_of_the_model(stack: Stack, killed: str) -> None:
    (letter,) = letters(stack, killed)
    assert (letter["cause"], letter["kind"], letter["payload"]) == ("attempts_exhausted", "request", True)


def test_the_dead_letter_is_an_alert(stack: Stack, killed: str, hooks: Hooks) -> None:
    def alerted() -> bool:
        return any(f'"endpoint":"{killed}"'.encode() in body for _, body in hooks.got)

    wait_until("the webhook of the alert", alerted)
    headers, body = next(each for each in hooks.got if killed.encode() in each[1])
    secret = stack.cli("webhook-secret", "--principal", "alerts")["secret"]
    event = Webhook(secret).verify(body, headers)
    assert event["type"] == "alert.firing"
    assert "DeadLetters" in [alert["rule"] for alert in event["data"]["alerts"]]
    assert "DeadLetters" in [a["rule"] for a in stack.cli("alerts")["items"] if a["endpoint"] == killed]
    tried = stack.cli("alerts", "test", "ops")["items"]
    assert [each["status"] for each in tried] == [204]


@pytest.mark.parametrize("victim", ["triton", "worker"])
def test_what_kills_more_than_the_model(stack: Stack, tmp_path: Path, victim: Victim) -> None:
    name = deployed(stack, victim, tmp_path / "mark")
    outcome = asyncio.run(held(stack.settings.gateway_url, name, victim, tmp_path / "mark"))
    assert outcome.met, outcome.line()
    assert len(letters(stack, name)) == 1


def test_jobs_beside_a_killer(stack: Stack, tmp_path: Path) -> None:
    name = "killer-jobs"
    signature = str(MODEL.with_name("signature.json"))
    mark = tmp_path / "mark"
    stack.deploy(MODEL, name, "--signature", signature, "--env", f"KILLER_MARK={mark}", "--min", "1")
    outcome = asyncio.run(held(stack.settings.gateway_url, name, "worker", mark, jobs=True))
    assert outcome.met, outcome.line()
    (letter,) = letters(stack, name)
    assert (letter["cause"], letter["kind"]) == ("attempts_exhausted", "job")


def dying(stack: Stack, name: str, replicas: int) -> list[Worker]:
    """The model that dies at some numbers, served by so many replicas; their workers."""
    signature, count = str(DEATHS.with_name("signature.json")), str(replicas)
    options = ("--signature", signature, *SETTINGS, "--min", count, "--max", count)
    stack.deploy(DEATHS, name, *options)
    wait_until("all are ready", lambda: states(stack, name) == ["ready"] * replicas)
    return [Worker(each["pid"], each["metrics_port"]) for each in stack.replicas(f"{name}-v1")]


def states(stack: Stack, name: str) -> list[str]:
    return [replica["state"] for replica in stack.replicas(f"{name}-v1")]


@pytest.mark.parametrize("replicas", [2, 1])
def test_a_model_whose_process_is_killed_under_load(stack: Stack, figure: Figure, replicas: int) -> None:
    """Nobody notices but by waiting; the worker goes on, and what happened is told."""
    name = f"dying-{replicas}"
    workers = dying(stack, name, replicas)
    kills = under_kills(
        stack.settings.gateway_url, name, workers, seconds=0, every_s=1.5, callers=8, at_least=replicas
    )
    outcome = asyncio.run(kills)
    assert outcome.met, outcome.line()
    assert outcome.kills == replicas
    figure(outcome.line())
    assert sorted(each["pid"] for each in stack.replicas(f"{name}-v1")) == sorted(w.pid for w in workers)
    words = "the model's process ended (signal 9, out of memory?)"
    wait_until("it is told", lambda: words in stack.run("why", name).stdout)
    assert words in " ".join(stack.run("status").stdout.split())
    stack.cli("delete", name, "--yes")


def test_the_neighbours_of_a_request_that_ends_the_process(stack: Stack, figure: Figure) -> None:
    dying(stack, "exits", 1)
    outcome = asyncio.run(with_a_guilty_one(stack.settings.gateway_url, "exits", rounds=2))
    assert outcome.met, outcome.line()
    assert (outcome.right, len(outcome.failures)) == (2 * (TOGETHER - 1), 2)
    figure(outcome.line())


def test_a_letter_is_reproduced_in_the_foreground(stack: Stack, killed: str) -> None:
    """On a model server of its own: the deployment that serves does not notice, and nothing is left."""
    (letter,) = letters(stack, killed)
    before = [replica["replica"] for replica in stack.replicas(f"{killed}-v1")]
    done = stack.run("reproduce", letter["letter"])
    assert done.returncode == 3, f"{done.stdout}\n{done.stderr}"
    assert "Reproduced: the model's process died" in done.stderr
    assert "Fatal Python error: Segmentation fault" in done.stdout
    assert "in _answer" in done.stdout, "where the model was"
    assert [replica["replica"] for replica in stack.replicas(f"{killed}-v1")] == before
    assert list((stack.settings.state_path / "reproduce").iterdir()) == []


def test_an_interrupted_reproduction_leaves_nothing(stack: Stack, killed: str) -> None:
    """Ctrl-C while the model runs: on the killer of the worker it would go on for a minute."""
    (letter,) = letters(stack, "killer-triton")
    command = [sys.executable, "-m", "tidegate.cli", "reproduce", letter["letter"]]
    with subprocess.Popen(
        command, env=stack.env, cwd=REPO, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("running the request"):
                break
        os.killpg(process.pid, signal.SIGINT)
        process.stderr.read()
        assert process.wait(60) == 130
    folder = stack.settings.state_path / "reproduce"
    assert list(folder.iterdir()) == []
    end = time.monotonic() + PATIENCE_S
    while left := [p for p in processes_of(folder) if p.is_running()]:
        assert time.monotonic() < end, [p.cmdline() for p in left]
        time.sleep(0.1)


def test_a_letter_is_replayed_elsewhere_and_forgotten(stack: Stack, killed: str, tmp_path: Path) -> None:
    """A version that survives the request answers it, as a job."""
    echo = MODELS / "echo" / "model.py"
    stack.deploy(echo, "survivor", "--signature", str(echo.with_name("signature.json")))
    (letter,) = letters(stack, killed)
    shown = stack.cli("dead", "replay", letter["letter"], "--to", "survivor-v1")
    (replay,) = shown["replays"]
    job = stack.cli("job", replay["job"], "--wait")
    assert job["status"] == "succeeded"
    (replay,) = stack.cli("dead", "show", letter["letter"])["replays"]
    assert replay["status"] == "succeeded"
    result = stack.cli("job", replay["job"], "--result")
    assert result["outputs"][0]["data"] == [1000.0]
    file = tmp_path / "frame"
    stack.cli("dead", "download", letter["letter"], "-o", str(file))
    assert file.stat().st_size == letter["payload_bytes"]
    stack.cli("dead", "delete", letter["letter"])
    assert letters(stack, killed) == []
