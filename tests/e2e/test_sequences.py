"""Stateful models: a sequence stays on one replica, in order, over every API; a lost replica is an error."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

from tests.conftest import PATIENCE_S
from tests.e2e.conftest import Stack

pytestmark = pytest.mark.e2e

SUMS = "sums"
SEQUENCES, REQUESTS = 20, 50
# Longer than any test: on a busy machine, a minute can pass between two requests of a sequence.
KEPT_US = 600_000_000
SMALL = "small-sums"
CONFIG = """
backend: "python"
max_batch_size: 8
input [ { name: "x" data_type: TYPE_INT32 dims: [ 1 ] } ]
output [ { name: "sum" data_type: TYPE_INT32 dims: [ 1 ] } ]
output [ { name: "home" data_type: TYPE_INT64 dims: [ 1 ] } ]
POLICY
sequence_batching {
  max_sequence_idle_microseconds: IDLE
  STRATEGY
  control_input [
    { name: "START" control [ { kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, 1 ] } ] },
    { name: "READY" control [ { kind: CONTROL_SEQUENCE_READY int32_false_true: [ 0, 1 ] } ] }
  ]
}
"""
# ``home`` names the process, so a test sees which replica has answered.
MODEL = """
import random

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.sums, self.home = {}, random.SystemRandom().getrandbits(62)

    def answer(self, request):
        x, start, ready = (
            pb_utils.get_input_tensor_by_name(request, name).as_numpy().item()
            for name in ("x", "START", "READY")
        )
        id_ = request.correlation_id()
        if ready:  # with the direct strategy, a slot without a request is not ready
            self.sums[id_] = SIGN * int(x) + (0 if start else self.sums[id_])
        return pb_utils.InferenceResponse([
            pb_utils.Tensor("sum", np.array([[self.sums.get(id_, 0)]], np.int32)),
            pb_utils.Tensor("home", np.array([[self.home]], np.int64)),
        ])

    def execute(self, requests):
        if not DECOUPLED:
            return [self.answer(request) for request in requests]
        for request in requests:
            sender, answer = request.get_response_sender(), self.answer(request)
            sender.send(answer)
            sender.send(answer, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
OLDEST = "oldest { max_candidate_sequences: 16 }"


def written(
    folder: Path,
    *,
    idle_us: int,
    strategy: str = OLDEST,
    rows: int = 8,
    sign: int = 1,
    decoupled: bool = False,
) -> Path:
    """Write a model. If it is decoupled, it sends each answer twice."""
    policy = "model_transaction_policy { decoupled: true }" if decoupled else ""
    replaced = {"IDLE": str(idle_us), "STRATEGY": strategy, "POLICY": policy, "size: 8": f"size: {rows}"}
    config, model = CONFIG, MODEL.replace("SIGN", str(sign)).replace("DECOUPLED", str(decoupled))
    for word, text in replaced.items():
        config = config.replace(word, text)
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(config)
    (folder / "1" / "model.py").write_text(model)
    return folder


@pytest.fixture(scope="module", autouse=True)
def models(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Deploy two models: one on two replicas, and a decoupled one that keeps two sequences for 15 s."""
    folder = tmp_path_factory.mktemp("models")
    large = written(folder / SUMS, idle_us=KEPT_US)
    small = written(folder / SMALL, idle_us=15_000_000, strategy="direct { }", rows=2, decoupled=True)
    with ThreadPoolExecutor() as pool:
        both = [
            pool.submit(stack.deploy, large, SUMS, "--min", "2", "--max", "2"),
            pool.submit(stack.deploy, small, SMALL, "--min", "1", "--max", "1"),
        ]
    for each in both:
        each.result()
    with triton.InferenceServerClient(stack.settings.gateway_grpc_target) as client:
        for sequence in on_two_replicas(client, 900):
            client.infer(SUMS, x(1), sequence_id=sequence, sequence_end=True)


@pytest.fixture
def client(stack: Stack) -> Iterator[Any]:
    with triton.InferenceServerClient(stack.settings.gateway_grpc_target) as found:
        yield found


def x(value: int, module: Any = triton) -> list[Any]:
    made = module.InferInput("x", [1, 1], "INT32")
    made.set_data_from_numpy(np.array([[value]], np.int32))
    return [made]


def flags(number: int) -> dict[str, bool]:
    return {"sequence_start": number == 0, "sequence_end": number == REQUESTS - 1}


def value(sequence: int, number: int) -> int:
    return 1000 * sequence + number


def expected(sequence: int) -> list[int]:
    return [int(each) for each in np.cumsum([value(sequence, number) for number in range(REQUESTS)])]


class Answers:
    """The sums and the homes of each sequence, in the order of the answers."""

    def __init__(self) -> None:
        self.sums: dict[int, list[int]] = {}
        self.homes: dict[int, set[int]] = {}

    def add(self, sequence: int, answer: Any) -> None:
        self.sums.setdefault(sequence, []).append(int(answer.as_numpy("sum").item()))
        self.homes.setdefault(sequence, set()).add(int(answer.as_numpy("home").item()))


async def unary(target: str, answers: Answers, sequences: range) -> None:
    async with triton_aio.InferenceServerClient(target) as client:

        async def one(sequence: int) -> None:
            for number in range(REQUESTS):
                x_ = x(value(sequence, number), triton_aio)
                answers.add(sequence, await client.infer(SUMS, x_, sequence_id=sequence, **flags(number)))

        await asyncio.gather(*map(one, sequences))


async def rest(url: str, answers: Answers, sequences: range) -> None:
    """Send with strings as ids, through tritonclient in a thread for each sequence."""

    def one(sequence: int) -> None:
        with triton_http.InferenceServerClient(url) as client:
            for number in range(REQUESTS):
                x_ = x(value(sequence, number), triton_http)
                answer = client.infer(SUMS, x_, sequence_id=f"session-{sequence}", **flags(number))
                answers.add(sequence, answer)

    await asyncio.gather(*(asyncio.to_thread(one, sequence) for sequence in sequences))


async def streamed(target: str, answers: Answers, sequences: range) -> None:
    """Send the requests of all sequences on one stream, without waiting for answers."""
    found: queue.Queue[Any] = queue.Queue()

    def run() -> None:
        with triton.InferenceServerClient(target) as client:
            client.start_stream(lambda result, error: found.put((result, error)))
            for number in range(REQUESTS):
                for sequence in sequences:
                    client.async_stream_infer(
                        SUMS, x(value(sequence, number)), request_id=str(sequence), sequence_id=sequence,
                        **flags(number),
                    )  # fmt: skip
            for _ in range(REQUESTS * len(sequences)):
                result, error = found.get(timeout=PATIENCE_S)
                assert error is None, error
                answers.add(int(result.get_response().id), result)

    await asyncio.to_thread(run)


def test_twenty_sequences_over_two_replicas(stack: Stack) -> None:
    answers = Answers()
    target, url = stack.settings.gateway_grpc_target, stack.settings.gateway_url.removeprefix("http://")

    async def all_at_once() -> None:
        await asyncio.gather(
            unary(target, answers, range(1, 8)),
            rest(url, answers, range(8, 12)),
            streamed(target, answers, range(12, SEQUENCES + 1)),
        )

    asyncio.run(all_at_once())
    assert answers.sums == {sequence: expected(sequence) for sequence in range(1, SEQUENCES + 1)}
    assert all(len(homes) == 1 for homes in answers.homes.values()), "a sequence has one replica"
    homes = Counter(next(iter(each)) for each in answers.homes.values())
    assert len(homes) == 2
    assert max(homes.values()) <= SEQUENCES * 3 / 4, homes


def test_what_a_client_of_triton_matches_on(stack: Stack, client: Any) -> None:
    with pytest.raises(InferenceServerException) as caught:
        client.infer(SUMS, x(1), sequence_id=77)
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert caught.value.message() == (
        "inference request for sequence 77 to model 'sums' must specify the START flag on the first request "
        "of the sequence"
    )
    with pytest.raises(InferenceServerException, match="must specify a non-zero or non-empty correlation ID"):
        client.infer(SUMS, x(1))
    client.infer(SUMS, x(1), sequence_id=78, sequence_start=True, sequence_end=True)
    with pytest.raises(InferenceServerException, match="must specify the START flag"):
        client.infer(SUMS, x(1), sequence_id=78)
    job = httpx.post(
        f"{stack.settings.gateway_url}/v2/models/{SUMS}/infer",
        json={"inputs": [{"name": "x", "datatype": "INT32", "shape": [1, 1], "data": [1]}],
              "parameters": {"sequence_id": 1, "sequence_start": True}},
        headers={"Prefer": "respond-async"},
    )  # fmt: skip
    assert job.status_code == 400
    assert "a job cannot belong to a sequence" in job.json()["error"]
    config = client.get_model_config(SUMS, as_json=True)["config"]
    assert config["sequence_batching"]["oldest"]["max_candidate_sequences"] == 16


def test_a_start_begins_again(client: Any) -> None:
    infer = partial(client.infer, SUMS, sequence_id=5)
    assert infer(x(40), sequence_start=True).as_numpy("sum").item() == 40
    assert infer(x(2)).as_numpy("sum").item() == 42
    assert infer(x(7), sequence_start=True).as_numpy("sum").item() == 7
    assert infer(x(1), sequence_end=True).as_numpy("sum").item() == 8


def events(stack: Stack, model: str, timeout_ms: int = 60_000, **body: Any) -> httpx.Response:
    url = f"{stack.settings.gateway_url}/v2/models/{model}/generate_stream"
    headers = {"X-Request-Timeout-Ms": str(timeout_ms)}
    return httpx.post(url, json=body, headers=headers, timeout=PATIENCE_S)


def sums_in(response: httpx.Response) -> list[int]:
    found = [json.loads(line.removeprefix("data: ")) for line in response.text.splitlines() if line]
    assert all("sum" in each for each in found), found
    return [each["sum"] for each in found]


def test_a_decoupled_model(stack: Stack) -> None:
    """Over gRPC the requests do not wait for answers."""
    found: queue.Queue[Any] = queue.Queue()
    with triton.InferenceServerClient(stack.settings.gateway_grpc_target) as client:
        client.start_stream(lambda result, error: found.put((result, error)))
        for number in range(10):
            client.async_stream_infer(
                SMALL, x(number), sequence_id="a", sequence_start=number == 0, sequence_end=number == 9
            )
        answers = [found.get(timeout=PATIENCE_S) for _ in range(20)]
    assert [error for _, error in answers if error is not None] == []
    sums = [int(result.as_numpy("sum").item()) for result, _ in answers]
    assert sums == [int(each) for each in np.repeat(np.cumsum(range(10)), 2)]
    assert sums_in(events(stack, SMALL, x=3, sequence_id=1, sequence_start=True)) == [3, 3]
    assert sums_in(events(stack, SMALL, x=4, sequence_id=1, sequence_end=True)) == [7, 7]


def test_idle_sequences_make_room(stack: Stack) -> None:
    assert sums_in(events(stack, SMALL, x=1, sequence_id=21, sequence_start=True)) == [1, 1]
    assert sums_in(events(stack, SMALL, x=2, sequence_id=22, sequence_start=True)) == [2, 2]
    refused = events(stack, SMALL, x=3, sequence_id=23, sequence_start=True, timeout_ms=200)
    assert (refused.status_code, refused.json()["reason"]) == (503, "overloaded")
    assert int(refused.headers["retry-after"]) >= 1
    assert "keeps 2 sequences, the limit of the replicas that are ready (1)" in refused.json()["error"]
    end = time.monotonic() + PATIENCE_S
    while (later := events(stack, SMALL, x=3, sequence_id=23, sequence_start=True)).status_code == 503:
        assert time.monotonic() < end, later.text
    assert sums_in(later) == [3, 3], "it has waited"
    gone = events(stack, SMALL, x=1, sequence_id=21)
    assert gone.status_code == 400
    assert "must specify the START flag" in gone.json()["error"]


def on_two_replicas(client: Any, first: int) -> dict[int, int]:
    """Start sequences, at least four, until both replicas keep some. Return their homes."""
    homes, end = dict[int, int](), time.monotonic() + PATIENCE_S
    while len(homes) < 4 or len(set(homes.values())) < 2:
        assert time.monotonic() < end, "the second replica gets no sequence"
        sequence = first + len(homes)
        answer = client.infer(SUMS, x(sequence), sequence_id=sequence, sequence_start=True)
        homes[sequence] = int(answer.as_numpy("home").item())
        time.sleep(0.05)
    return homes


def test_a_lost_replica_loses_its_sequences_only(stack: Stack, client: Any) -> None:
    homes = on_two_replicas(client, 100)
    victim = next(each for each in stack.replicas(f"{SUMS}-v1") if each["state"] == "ready")
    os.kill(victim["pid"], signal.SIGKILL)
    lost, kept = dict[int, InferenceServerException](), set()
    for sequence in homes:
        try:
            answer = client.infer(SUMS, x(1), sequence_id=sequence, client_timeout=PATIENCE_S)
        except InferenceServerException as error:
            lost[sequence] = error
        else:
            assert answer.as_numpy("sum").item() == sequence + 1
            kept.add(sequence)
    assert lost
    assert kept
    for told in lost.values():
        assert told.status() == "StatusCode.ABORTED"
        assert "start the sequence again" in told.message()
        assert "must specify the START flag" in told.message()
    assert not {homes[each] for each in lost} & {homes[each] for each in kept}
    again = min(lost)
    answer = client.infer(SUMS, x(5), sequence_id=again, sequence_start=True, sequence_end=True)
    assert answer.as_numpy("sum").item() == 5
    for sequence in kept:
        client.infer(SUMS, x(1), sequence_id=sequence, sequence_end=True)
    url = f"{stack.settings.gateway_url}/v2/models/{SUMS}/infer"
    body = {"inputs": [{"name": "x", "datatype": "INT32", "shape": [1, 1], "data": [1]}]}
    if rest := lost.keys() - {again}:
        answered = httpx.post(url, json=body | {"parameters": {"sequence_id": min(rest)}}, timeout=PATIENCE_S)
        assert (answered.status_code, answered.json()["reason"]) == (409, "sequence_lost")


def test_a_sequence_ends_where_it_began(stack: Stack, client: Any, tmp_path: Path) -> None:
    """A next version takes over, and a replica is drained. Both wait for the sequences that run."""
    homes = dict[int, int]()
    for sequence in range(200, 204):
        answer = client.infer(SUMS, x(sequence), sequence_id=sequence, sequence_start=True)
        homes[sequence] = int(answer.as_numpy("home").item())
    stack.deploy(written(tmp_path / SUMS, idle_us=KEPT_US, sign=-1), SUMS, "--min", "1", "--max", "1")
    end = time.monotonic() + PATIENCE_S
    once = {"sequence_id": 300, "sequence_start": True, "sequence_end": True}
    while (found := client.infer(SUMS, x(5), **once).as_numpy("sum").item()) == 5:
        assert time.monotonic() < end, "the next version has not taken over"
        time.sleep(0.05)
    assert found == -5
    stack.cli("scale", f"{SUMS}-v1", "0")
    end = time.monotonic() + PATIENCE_S
    while any(each["state"] == "ready" for each in stack.replicas(f"{SUMS}-v1")):
        assert time.monotonic() < end, "the replicas are not drained"
        time.sleep(0.05)
    for sequence, home in homes.items():
        answer = client.infer(SUMS, x(1), sequence_id=sequence, sequence_end=True)
        assert answer.as_numpy("sum").item() == sequence + 1
        assert answer.as_numpy("home").item() == home
