"""Triton's messages as plain values, and the class names of a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.worker.adapters.triton_facts import as_json, counts, labels
from tidegate.kernel.triton_protocol import pb

pytestmark = pytest.mark.unit


def test_a_configuration_is_shown_as_tritons_http_shows_it():
    config = pb.ModelConfigResponse().config
    config.name, config.max_batch_size = "m", 8
    config.input.add(name="x", data_type=11, dims=[-1, 2**40])
    config.dynamic_batching.max_queue_delay_microseconds = 2**40
    config.parameters["threads"].string_value = "1"
    found = as_json(config)
    assert (found["name"], found["max_batch_size"], found["backend"]) == ("m", 8, "")
    assert found["input"][0]["data_type"] == "TYPE_FP32"
    assert found["input"][0]["dims"] == [-1, 2**40], "a number, where protobuf's own JSON has a string"
    assert found["dynamic_batching"]["max_queue_delay_microseconds"] == 2**40
    assert "sequence_batching" not in found
    assert found["parameters"] == {"threads": {"string_value": "1"}}


def test_counts():
    told = pb.ModelStatistics(execution_count=2)
    told.inference_stats.success.count, told.inference_stats.queue.ns = 2, 7
    told.batch_stats.add(batch_size=4).compute_infer.ns = 9
    found = counts(told)
    assert found["execution_count"] == found["success.count"] == 2
    assert (found["queue.ns"], found["batch.4.compute_infer.ns"]) == (7, 9)


def test_labels(tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "names.txt").write_text("cat\ndog\n")
    (tmp_path / "secret").write_text("nothing for anybody")
    outputs = [
        {"name": "y", "label_filename": "names.txt"},
        {"name": "z", "label_filename": ""},
        {"name": "gone", "label_filename": "gone.txt"},
        {"name": "out", "label_filename": "../secret"},
    ]
    assert labels({"output": outputs}, tmp_path / "model") == {"y": ["cat", "dog"]}
