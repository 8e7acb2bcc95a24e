"""The gateway as a process, with the real broker and store, and a small worker."""

from __future__ import annotations

import asyncio
import json
import socket
import struct

import orjson
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import PATIENCE_S
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.presence import GatewayReport, ModelMetadata, ReplicaReport
from tidegate.kernel.store.live import GATEWAY, MODEL, REPLICA, ROUTES, STATISTICS

pytestmark = pytest.mark.integration

X = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}
INFER = "/v2/models/digits/infer"


async def test_json(client, worker):
    body = {"id": "seven", "inputs": [X | {"shape": [2, 2], "data": [[1, 2], [3, 4]]}]}
    answer = await client.post(INFER, json=body, headers={"X-Request-Id": "abc"})
    assert answer.status_code == 200
    assert answer.json() == {
        "model_name": "digits",
        "model_version": "1",
        "id": "seven",
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [2, 2], "data": [1, 2, 3, 4]}],
    }
    assert answer.headers["x-request-id"] == "abc"
    assert worker.requests[0].trace == b"abc"
    parts = dict(part.strip().split(";dur=") for part in answer.headers["server-timing"].split(","))
    assert (parts["wait"], parts["compute"]) == ("0.100", "0.200")
    assert sum(float(v) for k, v in parts.items() if k != "total") == pytest.approx(
        float(parts["total"]), abs=0.01
    )


async def test_binary(client, worker):
    raw = struct.pack("<2f", 0.5, -8)
    head = json.dumps(
        {
            "inputs": [
                {**{k: X[k] for k in ("name", "datatype", "shape")}, "parameters": {"binary_data_size": 8}}
            ],
            "outputs": [{"name": "y", "parameters": {"binary_data": True}}],
        }
    ).encode()
    answer = await client.post(
        "/v2/models/digits/versions/1/infer",
        content=head + raw,
        headers={"Inference-Header-Content-Length": str(len(head))},
    )
    length = int(answer.headers["inference-header-content-length"])
    assert answer.content[length:] == raw
    shown = json.loads(answer.content[:length])["outputs"]
    assert shown == [
        {"name": "y", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}}
    ]
    assert answer.headers["content-type"] == "application/octet-stream"


async def test_many_at_once(client, worker):
    async def ask(number: int) -> list[float]:
        answer = await client.post(INFER, json={"inputs": [X | {"data": [number, -number]}]})
        found: list[float] = answer.json()["outputs"][0]["data"]
        return found

    assert await asyncio.gather(*map(ask, range(100))) == [[n, -n] for n in range(100)]


@pytest.mark.parametrize(
    ("path", "content", "headers", "status", "reason"),
    [
        (INFER, b"{", {}, 400, "bad_request"),
        (INFER, b'{"inputs": []}', {}, 400, "bad_request"),
        (INFER, json.dumps({"inputs": [X]}).encode(), {"X-Request-Timeout-Ms": "soon"}, 400, "bad_request"),
        ("/v2/models/letters/infer", b"{}", {}, 404, "not_found"),
        ("/v2/models/digits/versions/9/infer", b"{}", {}, 404, "not_found"),
        (INFER, b"x" * 100_001, {}, 413, "payload_too_large"),
        (INFER, b"{}", {"Origin": "http://evil.example"}, 403, "forbidden"),
        (INFER, b"{}", {"Content-Encoding": "br"}, 400, "bad_request"),
        (INFER, json.dumps({"inputs": [X]}).encode(), {"X-Request-Timeout-Ms": "50"}, 504, "deadline_passed"),
    ],
)
async def test_errors(client, path, content, headers, status, reason):
    """The last request has no worker."""
    answer = await client.post(path, content=content, headers={"X-Request-Id": "abc", **headers})
    assert (answer.status_code, answer.json()["reason"]) == (status, reason)
    assert answer.json()["request_id"] == answer.headers["x-request-id"] == "abc"
    assert answer.json()["error"]
    transit, total = answer.headers["server-timing"].split(", ")
    assert transit.split(";dur=")[1] == total.split(";dur=")[1]
    assert float(total.split(";dur=")[1]) > (45 if status == 504 else 0), (
        "timers are accurate to a millisecond"
    )


async def test_an_error_of_the_model_reaches_the_caller(client, worker):
    worker.answer = lambda r: envelope.failure_frame(r.id, r.attempt, "model_failed", "out of tea")
    answer = await client.post(INFER, json={"inputs": [X]})
    assert (answer.status_code, answer.json()["error"]) == (500, "out of tea")


async def test_an_unreadable_answer(client, worker):
    worker.answer = lambda r: envelope.reply_frame(r.id, r.attempt, 1, b"\7\0garbage", [])
    answer = await client.post(INFER, json={"inputs": [X]})
    assert (answer.status_code, answer.json()["reason"]) == (503, "unavailable")


async def test_a_request_whose_caller_disconnects_is_cancelled(gateway, worker, until):
    """The worker gets the cancel, so that it does not compute in vain."""
    worker.answer = lambda _: None
    body = json.dumps({"inputs": [X]}).encode()
    head = f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", gateway.port)) as caller:
        caller.sendall(head.encode() + body)
        await until(lambda: worker.requests)
    await until(lambda: worker.requests[0].id in worker.cancelled, "the cancel")


async def test_configuration_and_statistics(client, gateway):
    assert (await client.get("/v2/models/letters/config")).status_code == 404
    unknown = await client.get("/v2/models/digits/config")
    assert (unknown.status_code, unknown.json()["reason"]) == (503, "not_known_yet")
    gateway.redis.set(MODEL + gateway.deployment, ModelMetadata({"name": "m", "max_batch_size": 8}).to_json())
    for path in ("/v2/models/digits/config", "/v2/models/digits/versions/1/config"):
        assert (await client.get(path)).json() == {"name": "digits", "max_batch_size": 8}
    gateway.redis.hincrby(STATISTICS + gateway.deployment, "success.count", 3)
    for path in ("/v2/models/stats", "/v2/models/digits/stats", "/v2/models/digits/versions/1/stats"):
        (found,) = (await client.get(path)).json()["model_stats"]
        assert (found["name"], found["inference_stats"]["success"]["count"]) == ("digits", 3)
    assert (await client.get("/v2/models/letters/stats")).status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/systemsharedmemory/status", 200),
        ("GET", "/v2/cudasharedmemory/region/r/status", 404),
        ("POST", "/v2/systemsharedmemory/region/r/register", 400),
        ("POST", "/v2/cudasharedmemory/unregister", 200),
        ("POST", "/v2/cudasharedmemory/region/r/register", 400),
        ("GET", "/v2/trace/setting", 200),
        ("POST", "/v2/models/digits/trace/setting", 200),
        ("GET", "/v2/models/nobody/trace/setting", 404),
        ("POST", "/v2/models/nobody/trace/setting", 404),
        ("POST", "/v2/logging", 200),
        ("POST", "/v2/repository/models/digits/load", 401),
    ],
)
async def test_operations_of_triton(client, method, path, status):
    assert (await client.request(method, path)).status_code == status


@pytest.mark.parametrize(
    ("path", "given", "told"),
    [
        ("/v2/logging", {"log_verbose_level": 3}, "'log_verbose_level' cannot be changed over this API"),
        ("/v2/trace/setting", {"trace_rate": "1"}, "OTEL_TRACES_SAMPLER_ARG"),
        ("/v2/trace/setting", {"colour": "red"}, "Unknown setting 'colour'"),
    ],
)
async def test_settings_of_traces_and_logs_are_only_shown(client, path, given, told):
    present = (await client.get(path)).json()
    assert (await client.post(path, json=present)).json() == present, "nothing changes"
    refused = await client.post(path, json=given)
    assert (refused.status_code, told in refused.json()["error"]) == (400, True)


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
@pytest.mark.parametrize("path", [INFER, "/v2/models/digits/versions/1/infer", "/v2/models/digits/generate"])
async def test_a_wrong_method_is_answered_with_the_right_one(client, method, path):
    answer = await client.request(method, path)
    assert (answer.status_code, answer.json()["reason"]) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"


async def test_a_slash_at_the_end_does_not_matter(client, worker):
    for path in ("/v2/", "/v2/health/ready/", "/v2/models/digits/"):
        assert (await client.get(path)).status_code == 200, "not a redirect"
    assert (await client.post(f"{INFER}/", json={"inputs": [X]})).status_code == 200


async def test_classes(client, worker):
    wanted = {"name": "y", "parameters": {"classification": 1}}
    answer = await client.post(INFER, json={"inputs": [X], "outputs": [wanted]})
    assert answer.json()["outputs"] == [
        {"name": "y", "datatype": "BYTES", "shape": [1, 1], "data": ["2.000000:1"]}
    ]


async def test_a_compressed_answer(client, worker):
    rows = {"inputs": [X | {"shape": [8, 2], "data": list(range(16))}], "parameters": {"p": "x" * 2000}}
    worker.answer = lambda r: envelope.reply_frame(
        r.id, r.attempt, 1, envelope.result_key((), {"long": "x" * 2000}), []
    )
    answer = await client.post(INFER, json=rows, headers={"Accept-Encoding": "gzip, deflate"})
    assert answer.headers["content-encoding"] == "gzip"
    assert answer.json()["parameters"] == {"long": "x" * 2000}
    plain = await client.post(INFER, json=rows, headers={"Accept-Encoding": "identity"})
    assert "content-encoding" not in plain.headers


async def test_metadata(client):
    assert (await client.get("/v2")).json()["name"] == "triton"
    assert (await client.get("/v2/health/live")).status_code == 200
    assert (await client.get("/v2/health/ready")).status_code == 200
    assert (await client.get("/v2/models")).json() == {"models": [{"name": "digits", "versions": ["1"]}]}
    shown = (await client.get("/v2/models/digits")).json()
    assert shown == {
        "name": "digits",
        "versions": ["1"],
        "platform": "tidegate_onnx",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 2]}],
    }
    assert (await client.get("/v2/models/digits/versions/1/ready")).status_code == 200
    assert (await client.get("/v2/models/letters/ready")).status_code == 404
    index = (await client.post("/v2/repository/index")).json()
    assert index == [{"name": "digits", "version": "1", "state": "READY", "reason": ""}]
    refused = await client.post("/v2/repository/models/digits/load")
    assert (refused.status_code, refused.json()["reason"]) == (401, "unauthorized")


async def test_the_control_plane_needs_the_token(client):
    assert (await client.get("/api/registry/v1/models")).status_code == 401
    assert (await client.post("/api/registry/v1/deploy", json={})).status_code == 401
    assert (await client.get("/metrics")).status_code == 200


async def test_it_reports_its_load(gateway, client, worker, until):
    await client.post(INFER, json={"inputs": [X]})

    def load():
        keys = gateway.redis.keys(GATEWAY + "*")
        report = GatewayReport.from_json(gateway.redis.get(keys[0]))
        found = report.deployments.get(gateway.deployment)
        return found if found and found.outstanding == 0 and found.arrived == found.completed > 0 else None

    assert await until(load)
    metrics = (await client.get("/metrics")).text
    assert f'tidegate_gateway_outstanding{{deployment="{gateway.deployment}"}} 0.0' in metrics
    assert 'tidegate_gateway_requests_total{model="digits",outcome="ok"}' in metrics


async def test_the_parts_of_a_requests_time_are_observed(client, add_model, make_peer, until):
    """Each answered request counts once in each part, and the parts add up to the total."""
    model = await add_model()
    whole, part = "tidegate_gateway_request_seconds", "tidegate_gateway_part_seconds"

    async def observed(which: str) -> dict[str, float]:
        """Return the ``count`` or ``sum`` of the total and of each part."""
        return {
            sample.labels.get("part", "whole"): sample.value
            for family in text_string_to_metric_families((await client.get("/metrics")).text)
            for sample in family.samples
            if sample.name in {f"{whole}_{which}", f"{part}_{which}"} and sample.labels["deployment"] == model
        }

    async with make_peer(model) as peer:
        await peer.connection.wait_up(PATIENCE_S)
        for _ in range(5):
            answer = await client.post(f"/v2/models/{model}/infer", json={"inputs": [X]})
            assert answer.status_code == 200
        refused = await client.post(f"/v2/models/{model}/infer", json={"inputs": []})
        assert refused.status_code == 400, "a refused request does not count as answered"

    parts = ("decode", "transit", "wait", "compute", "encode")
    wanted = dict.fromkeys(("whole", *parts), 5)

    async def counted() -> bool:
        return await observed("count") == wanted

    await until(counted)
    took = await observed("sum")
    assert took["wait"] == pytest.approx(5 * 100e-6)
    assert took["compute"] == pytest.approx(5 * 200e-6)
    assert all(took[each] > 0 for each in parts)
    assert sum(took[each] for each in parts) == pytest.approx(took["whole"])


async def test_requests_that_would_wait_too_long_are_refused_at_once(gateway, client, worker, until):
    """With one heavy replica and one request before, the wait is longer than the deadline."""
    report = ReplicaReport("r", gateway.deployment, 1, "h", 1, "ready", call_ms=60_000.0, batch_mean=1.0)
    gateway.redis.set(REPLICA + "r", report.to_json(), px=60_000)
    worker.answer = lambda _: None
    waiting = asyncio.create_task(
        client.post(INFER, json={"inputs": [X]}, headers={"X-Request-Timeout-Ms": "60000"})
    )
    await until(lambda: worker.requests, "the first one is admitted")

    async def refused():
        answer = await client.post(INFER, json={"inputs": [X]}, headers={"X-Request-Timeout-Ms": "100"})
        return answer if answer.status_code == 503 else None

    answer = await until(refused)
    assert answer.json()["reason"] == "overloaded"
    assert int(answer.headers["retry-after"]) >= 59
    gateway.redis.delete(REPLICA + "r")
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


async def test_a_new_route_table_is_used(gateway, client, table, until):
    def publish(n: int, name: str) -> None:
        raw = table(gateway.deployment)
        raw["n"] = n
        raw["endpoints"] = {name: raw["endpoints"]["digits"]}
        gateway.redis.set(ROUTES, orjson.dumps(raw))
        gateway.redis.publish("tidegate:routes:changed", b"")

    async def names() -> list[str]:
        return [m["name"] for m in (await client.get("/v2/models")).json()["models"]]

    async def named(name: str) -> bool:
        return await names() == [name]

    publish(5, "letters")
    await until(lambda: named("letters"))
    publish(4, "older")
    gateway.redis.set(ROUTES, b"garbage")
    gateway.redis.publish("tidegate:routes:changed", b"")
    gateway.redis.delete(ROUTES)
    publish(6, "digits")
    await until(lambda: named("digits"))


@pytest.mark.parametrize(("connections", "each"), [(22, 500), (2200, 1)])
async def test_requests_leave_nothing_to_the_garbage_collector(connections, each, gateway, client, worker):
    async def collected() -> float:
        text = (await client.get("/metrics")).text
        families = {family.name: family for family in text_string_to_metric_families(text)}
        return sum(sample.value for sample in families["python_gc_objects_collected"].samples)

    body = json.dumps({"inputs": [X]}).encode()
    head = f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    request = head.encode() + body

    few = asyncio.Semaphore(22)

    async def ask() -> None:
        async with few:
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            for _ in range(each):
                writer.write(request)
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                assert b" 200 " in head
                await reader.readexactly(length)
            writer.close()

    before = await collected()
    # With a reference cycle for each, the collector would run, because there are more objects than its
    # threshold.
    await asyncio.gather(*(ask() for _ in range(connections)))
    assert await collected() - before < 5000
