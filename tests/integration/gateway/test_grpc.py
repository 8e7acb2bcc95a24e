"""The gRPC API of a gateway process, with Triton's clients and a small worker."""

from __future__ import annotations

import asyncio
import queue
import struct
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from grpc_health.v1 import health_pb2
from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import InferenceServerException

from services.gateway.application.inference.core import MAX_TIMEOUT_MS
from services.gateway.domain.feedback_ids import FeedbackIds
from tests.conftest import PATIENCE_S
from tests.integration.gateway.process import make_table_with_feedback
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.presence import ModelMetadata
from tidegate.kernel.store import Store

pytestmark = pytest.mark.integration


def x(*values: float, rows: int = 1) -> Any:
    array = np.array(values, np.float32).reshape(rows, 2)
    made = triton.InferInput("x", array.shape, "FP32")
    made.set_data_from_numpy(array)
    return made


def request(**given: Any) -> Any:
    made = pb.ModelInferRequest(model_name="digits", **given)
    if not made.inputs:
        made.inputs.add(name="x", datatype="FP32", shape=[1, 2])
        made.raw_input_contents.append(struct.pack("<2f", 1, 2))
    return made


@pytest.fixture(scope="module")
def table() -> Callable[..., dict[str, Any]]:
    return make_table_with_feedback


@pytest.fixture
async def client(gateway) -> AsyncIterator[Any]:
    async with triton_aio.InferenceServerClient(gateway.grpc) as found:
        yield found


async def test_health_and_metadata(client, gateway):
    assert await client.is_server_live()
    assert await client.is_server_ready()
    assert await client.is_model_ready("digits")
    assert await client.is_model_ready("digits", "1")
    assert (await client.get_server_metadata()).name == "triton"
    shown = await client.get_model_metadata("digits", as_json=True)
    assert shown["inputs"] == [{"name": "x", "datatype": "FP32", "shape": ["-1", "2"]}]
    index = await client.get_model_repository_index(as_json=True)
    assert index["models"] == [{"name": "digits", "version": "1", "state": "READY"}]
    assert not await client.is_model_ready("letters")
    assert not await client.is_model_ready("digits", "9")
    with pytest.raises(InferenceServerException) as caught:
        await client.get_model_metadata("letters")
    assert caught.value.status() == "StatusCode.NOT_FOUND"


async def test_the_configuration(client, gateway, valkey_url):
    with pytest.raises(InferenceServerException, match="not known until the first replica") as caught:
        await client.get_model_config("digits")
    assert caught.value.status() == "StatusCode.UNAVAILABLE"
    store = Store.connect(valkey_url)
    config = {
        "name": "model",
        "max_batch_size": 8,
        "input": [{"name": "x", "dims": [2], "of_a_later_day": 1}],
    }
    await store.publish_model(gateway.deployment, ModelMetadata(config))
    found = (await client.get_model_config("digits")).config
    assert (found.name, found.max_batch_size, found.input[0].dims) == ("digits", 8, [2])
    await store.close()


async def test_the_statistics(client, gateway, valkey_url):
    store = Store.connect(valkey_url)
    counts = {"inference_count": 5, "success.count": 3, "success.ns": 900, "batch.4.compute_infer.count": 1}
    for _ in range(2):
        await store.add_statistics(gateway.deployment, counts, 1_700_000_000_000)
    for asked in ("digits", ""):
        (found,) = (await client.get_inference_statistics(asked)).model_stats
        assert (found.name, found.version, found.last_inference) == ("digits", "1", 1_700_000_000_000)
        assert (found.inference_count, found.inference_stats.success.ns) == (10, 1800)
        assert [(b.batch_size, b.compute_infer.count) for b in found.batch_stats] == [(4, 2)]
    await store.close()


async def test_infer(client, worker):
    answer = await client.infer("digits", [x(1, 2, 3, 4, rows=2)], request_id="seven")
    assert answer.as_numpy("y").tolist() == [[1, 2], [3, 4]]
    told = answer.get_response()
    assert (told.model_name, told.model_version, told.id) == ("digits", "1", "seven")


@pytest.mark.parametrize("version", ["", "1"])
async def test_metadata_of_a_call(stub, worker, version):
    call = stub.ModelInfer(request(model_version=version), metadata=(("x-request-id", "abc"),))
    await call
    trailers = dict(await call.trailing_metadata())
    assert trailers["x-request-id"] == "abc"
    assert worker.requests[0].trace == b"abc"
    parts = dict(part.strip().split(";dur=") for part in trailers["server-timing"].split(","))
    assert (parts["wait"], parts["compute"]) == ("0.100", "0.200")
    assert sum(float(v) for k, v in parts.items() if k != "total") == pytest.approx(
        float(parts["total"]), abs=0.01
    )


async def test_ids_for_feedback(stub, gateway, worker):
    call = stub.ModelInfer(request(), metadata=(("x-request-id", "abc"),))
    answer = await call
    trailer = dict(await call.trailing_metadata())["x-feedback-id"]
    assert answer.parameters["feedback_id"].string_param == trailer
    facts = FeedbackIds("token").read(trailer)
    assert facts is not None
    assert (facts.deployment, facts.request_id, facts.assigned) == (gateway.deployment, "abc", True)
    versioned = stub.ModelInfer(request(model_version="1"))
    facts = FeedbackIds("token").read((await versioned).parameters["feedback_id"].string_param)
    assert facts is not None
    assert not facts.assigned, "the request chose its version"

    async def requests() -> AsyncIterator[Any]:
        yield request()

    async for streamed in stub.ModelStreamInfer(requests()):
        assert FeedbackIds("token").read(streamed.infer_response.parameters["feedback_id"].string_param)
    body = {"x": [[1, 2]]}
    async with httpx.AsyncClient(base_url=gateway.url, timeout=PATIENCE_S) as http:
        tensor = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}
        for path, content in (("infer", {"inputs": [tensor]}), ("generate", body), ("generate_stream", body)):
            told = await http.post(f"/v2/models/digits/{path}", json=content, headers={"x-request-id": "r"})
            facts = FeedbackIds("token").read(told.headers.get("x-feedback-id", ""))
            assert facts is not None, told.text
            assert (facts.request_id, facts.assigned) == ("r", True)
            assert told.headers["x-request-id"] == "r"


async def test_typed_contents(stub, worker):
    asked = pb.ModelInferRequest(model_name="digits")
    asked.inputs.add(name="x", datatype="FP32", shape=[1, 2]).contents.fp32_contents.extend([0.5, -8])
    answer = await stub.ModelInfer(asked)
    assert list(answer.raw_output_contents) == [struct.pack("<2f", 0.5, -8)]


async def test_classes(client, worker):
    wanted = triton.InferRequestedOutput("y", class_count=1)
    answer = await client.infer("digits", [x(1, 2, 9, 3, rows=2)], outputs=[wanted])
    assert answer.as_numpy("y").tolist() == [[b"2.000000:1"], [b"9.000000:0"]]


async def test_timeout_and_priority_parameters_reach_the_queue(client, worker):
    await client.infer("digits", [x(1, 2)], priority=2, timeout=5_000_000)
    found = worker.requests[0]
    assert found.flags >> envelope.PRIORITY_SHIFT == 2
    assert envelope.read_call_key(found.key).parameters == {}


@pytest.mark.parametrize(
    ("asked", "code", "reason"),
    [
        (request(model_version="9"), "NOT_FOUND", "not_found"),
        (
            request(id="a", parameters={"sequence_id": pb.InferParameter(int64_param=-3)}),
            "INVALID_ARGUMENT",
            "",
        ),
        (
            request(raw_input_contents=[b""], inputs=[{"name": "x", "datatype": "FP32"}]),
            "INVALID_ARGUMENT",
            "",
        ),
        (request(raw_input_contents=[bytes(200_000)]), "RESOURCE_EXHAUSTED", None),
    ],
)
async def test_refusals(stub, asked, code, reason):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ModelInfer(asked)
    assert caught.value.code().name == code
    if reason is not None:
        assert dict(caught.value.trailing_metadata())["reason"] == (reason or "bad_request")


@pytest.mark.parametrize(
    ("method", "code"),
    [
        ("RepositoryModelLoad", "UNAUTHENTICATED"),
        ("RepositoryModelUnload", "UNAUTHENTICATED"),
        ("SystemSharedMemoryRegister", "INVALID_ARGUMENT"),
        ("CudaSharedMemoryRegister", "INVALID_ARGUMENT"),
    ],
)
async def test_operations_of_triton_that_are_refused(stub, method, code):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await getattr(stub, method)(getattr(pb, f"{method}Request")())
    assert caught.value.code().name == code
    assert caught.value.details()


async def test_settings_of_traces_and_logs_are_only_shown(stub):
    shown = await stub.LogSettings(pb.LogSettingsRequest())
    same = pb.LogSettingsRequest()
    for name, value in shown.settings.items():
        kind = value.WhichOneof("parameter_choice")
        setattr(same.settings[name], kind, getattr(value, kind))
    assert await stub.LogSettings(same) == shown
    same.settings["log_verbose_level"].uint32_param = 3
    with pytest.raises(grpc.aio.AioRpcError, match="TIDEGATE_LOG_LEVEL"):
        await stub.LogSettings(same)
    traces = await stub.TraceSetting(pb.TraceSettingRequest())
    assert list(traces.settings["trace_level"].value) == ["OFF"]
    with pytest.raises(grpc.aio.AioRpcError, match="OTEL_TRACES_SAMPLER_ARG"):
        await stub.TraceSetting(pb.TraceSettingRequest(settings={"trace_level": {"value": ["TIMESTAMPS"]}}))
    with pytest.raises(grpc.aio.AioRpcError, match="Request for unknown model") as caught:
        await stub.TraceSetting(pb.TraceSettingRequest(model_name="nobody"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("metadata", [(), (("x-request-timeout-ms", "50"),)])
async def test_deadlines(stub, worker, metadata):
    worker.answer = lambda _: None
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ModelInfer(request(), timeout=None if metadata else 0.05, metadata=metadata)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_deadline_in_years(stub, worker):
    """Longer than the broker accepts; it must not close the connection of the others."""
    for _ in range(2):
        answer = await stub.ModelInfer(request(), timeout=10 * 366 * 86_400)
        assert len(answer.raw_output_contents) == 1
    left_ms = worker.requests[0].deadline_ms - time.time() * 1e3
    assert left_ms <= MAX_TIMEOUT_MS


async def test_errors_have_server_timing(stub, worker):
    worker.answer = lambda r: envelope.failure_frame(r.id, r.attempt, "model_failed", "out of tea")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ModelInfer(request())
    transit, total = dict(caught.value.trailing_metadata())["server-timing"].split(", ")
    assert transit.removeprefix("transit;dur=") == total.removeprefix("total;dur=")


async def test_a_long_error_of_the_model_is_cut(stub, worker):
    worker.answer = lambda r: envelope.failure_frame(
        r.id, r.attempt, "model_failed", "out of tea, ö\n" * 9000
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ModelInfer(request())
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert caught.value.details().startswith("out of tea, ö\nout")


async def test_a_request_whose_caller_disconnects_is_cancelled(stub, worker, until):
    worker.answer = lambda _: None
    call = stub.ModelInfer(request())
    await until(lambda: worker.requests)
    call.cancel()
    await until(lambda: worker.cancelled == [worker.requests[0].id], "the cancel")


async def test_a_stream_answers_in_order_whatever_the_worker_does_and_lives_on_after_an_error(
    stub, worker, until
):
    echo = worker.answer
    worker.answer = lambda _: None

    async def requests() -> AsyncIterator[Any]:
        for number in range(3):
            yield request(id=str(number))
        yield request(id="wrong", model_version="9")

    call = stub.ModelStreamInfer(requests())
    await until(lambda: len(worker.requests) == 3)
    replies = [echo(found) for found in reversed(worker.requests)]
    await worker.connection.channel.publish(
        envelope.pack(envelope.REPLIES, replies), routing_key=worker.deliveries[0].reply_to
    )
    answers = [answer async for answer in call]
    assert [a.infer_response.id for a in answers] == ["0", "1", "2", "wrong"]
    assert [a.error_message for a in answers[:3]] == [""] * 3
    assert answers[3].error_message == (
        "Request for unknown model: 'digits' version 9 is not found; it has ['1']"
    )
    assert all(a.infer_response.parameters["triton_final_response"].bool_param for a in answers[:3])


async def test_a_stream_whose_caller_disconnects_is_cancelled(stub, worker, until):
    worker.answer = lambda _: None

    async def requests() -> AsyncIterator[Any]:
        yield request()
        yield request()
        await asyncio.sleep(60)

    call = stub.ModelStreamInfer(requests())
    await until(lambda: len(worker.requests) == 2)
    call.cancel()
    await until(lambda: len(worker.cancelled) == 2, "the cancels")


async def test_the_plain_client_streams(gateway, worker):
    def stream() -> list[Any]:
        found: queue.Queue[Any] = queue.Queue()
        with triton.InferenceServerClient(gateway.grpc) as client:
            client.start_stream(lambda result, error: found.put((result, error)))
            for number in range(20):
                client.async_stream_infer("digits", [x(number, 0)], request_id=str(number))
            answers = [found.get(timeout=PATIENCE_S) for _ in range(20)]
            client.stop_stream()
        return answers

    answers = await asyncio.to_thread(stream)
    assert [error for _, error in answers] == [None] * 20
    assert [result.as_numpy("y")[0, 0] for result, _ in answers] == list(range(20))


async def test_health(gateway):
    async with grpc.aio.insecure_channel(gateway.grpc) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        for service in ("", "inference.GRPCInferenceService"):
            answer = await check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await check(health_pb2.HealthCheckRequest(service="mail"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        watch = channel.unary_stream(
            "/grpc.health.v1.Health/Watch",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()
