"""Names, nouns, queues, reports and log lines: what all services have in common."""

from __future__ import annotations

import io
import json
import logging

import orjson
import pytest
from pydantic import TypeAdapter, ValidationError

from tidegate.kernel import telemetry
from tidegate.kernel.broker import topology
from tidegate.kernel.protocol.models import DeploymentSpec, Name, Signature, TensorSpec
from tidegate.kernel.protocol.presence import EngineReport, GatewayLoad, GatewayReport, ReplicaReport

pytestmark = pytest.mark.unit

NAME = TypeAdapter(Name)


@pytest.mark.parametrize("name", ["a", "7", "digits", "digits-v1", "a" * 63, "0--0"])
def test_names(name):
    assert NAME.validate_python(name) == name


@pytest.mark.parametrize(
    "name", ["", "-a", "a-", "_a", ".a", "a.", "..", "a b", "a/b", "ä", "a" * 64, "a\n", " a", "a\0"]
)
def test_what_is_no_name(name):
    with pytest.raises(ValidationError):
        NAME.validate_python(name)


def test_a_misspelt_option_is_an_error():
    with pytest.raises(ValidationError, match="max_replica"):
        DeploymentSpec.model_validate({"name": "a", "model": "a", "version": 1, "max_replica": 3})


def test_defaults_are_not_shared():
    one, other = (DeploymentSpec(name="a", model="a", version=1) for _ in range(2))
    one.env["A"] = "1"
    one.batching.window_ms = 5
    assert (other.env, other.batching.window_ms) == ({}, 0)
    assert DeploymentSpec(name="b", model="a", version=1).batching.window_ms == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"inputs": []},
        {"outputs": []},
        {"max_batch_size": -1},
        {"inputs": [{"name": "", "datatype": "FP32"}]},
        {"inputs": [{"name": "x", "datatype": "FP8"}]},
        {"inputs": [{"name": "x", "datatype": "FP32", "shape": [-2]}]},
    ],
    ids=str,
)
def test_what_is_no_signature(wrong):
    right = Signature(
        inputs=[TensorSpec(name="x", datatype="FP32", shape=[-1])],
        outputs=[TensorSpec(name="y", datatype="FP32")],
    )
    assert Signature.model_validate(right.model_dump()) == right
    with pytest.raises(ValidationError):
        Signature.model_validate(right.model_dump() | wrong)


def test_replica_report_round_trip():
    report = ReplicaReport(
        replica="digits-v1-0-1",
        deployment="digits-v1",
        generation=1,
        host="h",
        pid=7,
        state="ready",
        phases_ms={"load": 1.5},
        call_ms=None,
        signature={"inputs": []},
    )
    assert ReplicaReport.from_json(report.to_json()) == report


def test_a_report_of_a_newer_worker_is_read():
    report = ReplicaReport("r", "d", 1, "h", 7, "ready")
    newer = orjson.loads(report.to_json()) | {"colour": "blue"}
    assert ReplicaReport.from_json(orjson.dumps(newer)) == report


def test_the_facts_of_an_engine_travel_in_its_replicas_report():
    stats = {"slots": 4, "running": 3, "kv_used": 900.0, "kv_total": 4096, "waiting": None, "colour": "blue"}
    report = ReplicaReport("r", "d", 1, "h", 7, "ready", llm=EngineReport.of(stats))
    assert report.llm == EngineReport(slots=4, running=3, kv_used=900, kv_total=4096)
    assert ReplicaReport.from_json(report.to_json()) == report


@pytest.mark.parametrize("value", [-1, "7", float("nan"), float("inf"), True, [1], None])
def test_an_unusable_fact_of_an_engine_is_unknown(value):
    assert EngineReport.of({"slots": value}) == EngineReport()


def test_gateway_report_round_trip():
    report = GatewayReport("g1", 12.5, {"digits-v1": GatewayLoad(1, 10, 8, 1)})
    assert GatewayReport.from_json(report.to_json()) == report


def test_a_report_of_a_newer_gateway_is_read():
    report = GatewayReport("g1", 12.5, {"digits-v1": GatewayLoad(1, 10, 8, 1)})
    newer = orjson.loads(report.to_json()) | {"colour": "blue"}
    newer["deployments"]["digits-v1"]["bytes"] = 7
    assert GatewayReport.from_json(orjson.dumps(newer)) == report


def test_queues_are_apart():
    names = {
        topology.requests_queue("a").name,
        topology.requests_queue("b").name,
        topology.requests_queue("a", "high").name,
        topology.requests_queue("a.high").name,
        topology.replica_queue("a", "a-0-1", "normal").name,
        topology.replica_queue("a", "a-0-1", "high").name,
        topology.suspects_queue(topology.requests_queue("a")).name,
        topology.replies_queue("a").name,
        topology.events_queue("router", "a").name,
        topology.cancels_queue("a-0-1", "a").name,
        topology.EXCEPTIONS.name,
    }
    assert len(names) == 11
    of_a_b = (topology.requests_queue("a.b", "low"), topology.replica_queue("a.b", "a.b-0-1", "low"))
    assert [topology.deployment_of(queue.name) for queue in of_a_b] == ["a.b", "a.b"]
    assert topology.demand_key("digits-v1") == "demand.digits-v1"


def test_queues_that_must_outlive_a_connection_do():
    assert not topology.requests_queue("a").exclusive
    assert not topology.replies_queue("a").exclusive
    assert topology.cancels_queue("r", "i").exclusive


def test_log_lines_are_json():
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        telemetry.configure("gateway", "info")
        handler.setFormatter(root.handlers[0].formatter)
        root.handlers[:] = [handler]
        mark = telemetry.request_id.set("abc")
        telemetry.logger("somewhere").info("größe", extra={"bytes": 7})
        telemetry.request_id.reset(mark)
        telemetry.logger("somewhere").info("later")
        telemetry.logger("somewhere").debug("not shown")
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "level": "info",
        "service": "gateway",
        "logger": "somewhere",
        "message": "größe",
        "bytes": 7,
        "request_id": "abc",
    }
    assert "request_id" not in second
