"""The grid, the front, the choice and the request: what ``tidegate tune`` decides without measuring."""

from __future__ import annotations

import numpy as np
import pytest

from tidegate.client.core import arrange
from tidegate.kernel.protocol.capacity import measured_rps
from tidegate.tune import calls, grid, inputs
from tidegate.tune.curve import Point, choose, front, quantile
from tidegate.tune.grid import BatchSetting
from tidegate.tune.load_generator import LoadCounters, length_of
from tidegate.tune.measurement import GatewayAddress, request_bytes

pytestmark = pytest.mark.unit


def point(rps: float, p99_ms: float | None, failed: int = 0, batch: int = 1, window: float = 0.0) -> Point:
    return Point(BatchSetting(window, batch), 8, rps, p99_ms, p99_ms, failed=failed)


@pytest.mark.parametrize(
    ("limit", "rows", "expected"),
    [
        (0, 1, [1]),
        (1, 1, [1]),
        (16, 1, [1, 2, 4, 8, 16]),
        (20, 1, [1, 2, 4, 8, 16, 20]),
        (1024, 1, [1, 2, 4, 8, 16, 32, 64]),
        (1024, 4, [4, 8, 16, 32, 64, 128, 256]),
        (6, 4, [4, 6]),
    ],
)
def test_batches_double_up_to_what_the_model_or_all_callers_fill(limit, rows, expected):
    assert grid.batches(limit, rows, (1, 8, 64)) == expected


def test_settings_come_without_windows_first_and_none_twice():
    found = grid.settings([1, 2, 8], (0.0, 2.0), rows=1)
    assert [str(setting) for setting in found] == [
        "batch 1",
        "batch 2",
        "batch 8",
        "batch 2, window 2 ms",
        "batch 8, window 2 ms",
    ]
    assert grid.settings([8], (5.0,), rows=8) == [BatchSetting(0.0, 8)], (
        "one request fills it: it waits for none"
    )
    assert BatchSetting(2.0, 8).to_json() == {"max_batch": 8, "window_ms": 2.0}


def test_load_levels():
    assert grid.load_levels(None) == [1, 8, 64]
    assert grid.load_levels([16, 2, 16]) == [2, 16]


def test_quantiles_are_values_that_were_seen():
    assert quantile([], 0.99) is None
    assert quantile([7.0], 0.5) == 7.0
    hundred = [float(value) for value in range(1, 101)]
    assert (quantile(hundred, 0.5), quantile(hundred, 0.99)) == (50.0, 99.0)
    assert quantile(hundred[:10], 0.99) == 10.0


def test_front():
    slow, quick, worse, middle = point(900, 50), point(100, 2), point(90, 3), point(400, 9)
    same_p99 = point(300, 9)
    unmeasured, broken = point(0, None), point(9000, 1, failed=3)
    assert front([slow, quick, worse, same_p99, middle, unmeasured, broken]) == [quick, middle, slow]
    assert front([]) == []


def test_choice_is_the_most_throughput_within_the_latency():
    points = [point(900, 50), point(400, 9), point(100, 2), point(5000, 4, failed=1)]
    assert choose(points, 60) == points[0]
    assert choose(points, 49) == points[1]
    assert choose(points, 1) is None
    assert choose([point(0, None)], 100) is None


def test_throughput_within_noise_is_the_same_so_latency_decides():
    points = [point(1000, 50), point(985, 9), point(900, 2)]
    assert choose(points, 60) == points[1]


def test_what_is_kept_with_the_version():
    metrics = point(1234.5678, 9.87654, batch=16, window=2.0).capacity().to_metrics()
    assert metrics == {
        "capacity_rps": 1234.568,
        "capacity_p99_ms": 9.877,
        "capacity_max_batch": 16.0,
        "capacity_window_ms": 2.0,
    }
    assert measured_rps(metrics) == 1234.568
    assert measured_rps({"accuracy": 0.9}) is None
    assert measured_rps({"capacity_rps": float("nan")}) is None


def test_zeros_fit_the_signature():
    signature = {
        "inputs": [
            {"name": "x", "datatype": "FP32", "shape": [-1, 3]},
            {"name": "s", "datatype": "BYTES", "shape": [2]},
            {"name": "o", "datatype": "INT8", "shape": [1], "optional": True},
        ],
        "max_batch_size": 8,
    }
    found = inputs.zeros(signature)
    assert set(found) == {"x", "s"}
    assert found["x"].shape == (1, 1, 3)
    assert found["x"].dtype == np.float32
    assert found["s"].tolist() == [[b"", b""]]
    assert inputs.zeros({**signature, "max_batch_size": 0})["x"].shape == (1, 3)
    tensors = arrange("m", found, signature)
    assert inputs.rows_of(tensors, 8) == 1
    assert inputs.rows_of(arrange("m", {"x": np.zeros((5, 2, 3), np.float32)}, signature), 8) == 5
    assert inputs.rows_of(tensors, 0) == 1


def test_the_request_on_the_wire():
    address = GatewayAddress.of("https://example.test/base/")
    assert address == GatewayAddress("example.test", 443, True, "/base")
    raw = request_bytes(address, "digits-tune", b"{}xyz", 2)
    head, body = raw.split(b"\r\n\r\n")
    assert head.startswith(b"POST /base/v2/models/digits-tune/infer HTTP/1.1\r\nHost: example.test:443\r\n")
    assert b"\r\nContent-Length: 5" in head
    assert b"\r\nInference-Header-Content-Length: 2" in head
    assert body == b"{}xyz"


def test_answers_are_counted_while_they_count():
    count = LoadCounters()
    count.note(200, 0.1, b"")
    assert count.answers == 0, "the warm-up"
    count.counts = True
    count.note(200, 0.2, b"")
    count.note(503, 0.3, b'{"error": "full"}')
    count.note(500, 0.3, b"what")
    assert (count.answers, count.latencies) == (1, [0.2])
    assert (count.failed, count.problem, count.status) == (2, "full", 503)
    assert length_of(b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n") == 12
    with pytest.raises(ValueError, match="no Content-Length"):
        length_of(b"HTTP/1.1 200 OK\r\n\r\n")


def test_the_mean_batch_from_the_workers_counters():
    page = "# HELP x\ntidegate_worker_call_requests_count 10.0\ntidegate_worker_call_requests_sum 25.0\n"
    before = calls.parse(page)
    assert before == calls.Calls(10.0, 25.0)
    assert calls.Calls(14.0, 45.0).mean_since(before) == 5.0
    assert before.mean_since(before) is None
    assert calls.parse("") is None
