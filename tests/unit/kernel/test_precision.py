"""Comparing answers of a lower precision, the CPU's flags, and what a model file says about itself."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tidegate.kernel.precision import cpu, embedded
from tidegate.kernel.precision.embedded import Precision
from tidegate.kernel.precision.loss import likeness, measure_of, sqnr_db

pytestmark = pytest.mark.unit

SHARES = np.array([[0.9, 0.1], [0.2, 0.8]], np.float32)
SCORES = np.array([[3.0, -1.0], [0.0, 2.0]], np.float32)
LONG = np.random.default_rng(1).normal(size=(4, 32)).astype(np.float32)


def test_outputs_say_how_they_are_compared():
    assert measure_of({"probabilities": SHARES, "label": np.array([0, 1])}, False) == ("agreement", "label")
    assert measure_of({"p": SHARES}, False) == ("agreement", "p")
    assert measure_of({"s": SCORES}, False) == ("error", "s")
    assert measure_of({"s": SCORES}, True) == ("agreement", "s")
    assert measure_of({"e": LONG}, False) == ("cosine", "e")
    assert measure_of({"y": SCORES[:, :1]}, False) == ("error", "y")


def test_likeness_of_classes_directions_and_numbers():
    assert likeness("agreement", SHARES, SHARES[:, ::-1]) == 0.0
    assert likeness("agreement", np.array([1, 2, 3, 4]), np.array([1, 2, 3, 9])) == 0.75
    assert likeness("cosine", LONG, 2 * LONG) == pytest.approx(1.0)
    assert likeness("error", LONG, 0.9 * LONG) == pytest.approx(0.9)
    assert likeness("cosine", LONG, LONG[:2]) == 0.0
    assert likeness("error", LONG, LONG * np.nan) == 0.0
    assert likeness("cosine", np.zeros((2, 16)), np.zeros((2, 16))) == 1.0


def test_noise_in_decibels():
    assert sqnr_db({"e": LONG}, {"e": 1.1 * LONG}) == pytest.approx(20.0, abs=0.01)
    assert sqnr_db({"e": LONG}, {"e": LONG}) is None


def test_a_cpu_with_vnni_adds_bytes_exactly():
    found = cpu.parse("model name\t: EPYC\nflags\t\t: fpu avx2 avx512_vnni\nmodel name\t: other\n")
    assert (found.name, found.flags, found.exact) == ("EPYC", ("avx2", "avx512_vnni"), True)
    assert cpu.parse("flags: avx2 avx512f", "x86_64") == cpu.Cpu("x86_64", ("avx2", "avx512f"))
    assert not cpu.parse("flags: avx2 avx512f").exact
    assert cpu.parse("Features: asimddp").exact


PRECISION = Precision("qdq-reduced", "agreement", "y", 0.002, 0.005, 100, "EPYC", ("avx2",))


def saved(path: Path) -> Path:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])], "g",
        [value("x", TensorProto.FLOAT, ["n", 2])], [value("y", TensorProto.FLOAT, ["n", 2])],
    )  # fmt: skip
    onnx.save(helper.make_model(graph), str(path))
    return path


def test_an_onnx_file_keeps_what_was_added_to_it(tmp_path: Path):
    model = saved(tmp_path / "m.onnx")
    assert embedded.read(model) is None
    packed = io.BytesIO()
    arrays: dict[str, Any] = {"in:x": SCORES, "out:y": SHARES}
    np.savez(packed, **arrays)
    embedded.append(model, PRECISION, packed.getvalue())
    found = embedded.read(model)
    assert found is not None
    assert found.precision == PRECISION
    assert (found.inputs["x"] == SCORES).all()
    assert (found.outputs["y"] == SHARES).all()
    loaded = onnx.load(str(model))
    onnx.checker.check_model(loaded)
    assert [each.key for each in loaded.metadata_props] == [embedded.RECIPE_KEY, embedded.SAMPLES_KEY]


def test_without_samples_and_damaged(tmp_path: Path):
    model = saved(tmp_path / "m.onnx")
    embedded.append(model, PRECISION, None)
    found = embedded.read(model)
    assert found is not None
    assert found.inputs == found.outputs == {}
    damaged = saved(tmp_path / "d.onnx")
    with damaged.open("ab") as file:
        entry = b"\x0a\x12tidegate.precision\x12\x02{]"
        file.write(bytes([14 << 3 | 2, len(entry)]) + entry)
    assert embedded.read(damaged) is None
    (tmp_path / "other").write_bytes(b"not protobuf at all")
    assert embedded.read(tmp_path / "other") is None
