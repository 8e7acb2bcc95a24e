"""The arguments of ``predict``, and the conversion of its result."""

from __future__ import annotations

import importlib.util
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tidegate.kernel.protocol.models import Datatype

pytestmark = pytest.mark.unit

PATH = Path(__file__).parents[3] / "services" / "worker" / "runtimes" / "function" / "values.py"
NUMPY = {"TYPE_FP32": np.float32, "TYPE_INT64": np.int64, "TYPE_UINT8": np.uint8}
Pair = namedtuple("Pair", ["label", "score"])


@dataclass
class Both:
    label: str
    score: Any


@pytest.fixture(scope="module")
def values() -> ModuleType:
    """Import the module as the models' Python does: without a package."""
    spec = importlib.util.spec_from_file_location("tidegate_values", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def named(values: ModuleType):
    def run(result: Any, *specs: tuple[str, Datatype, list[int]], rows: int | None = None) -> dict[str, Any]:
        listed = [{"name": name, "datatype": datatype, "dims": dims} for name, datatype, dims in specs]
        return dict(values.Outputs(listed, NUMPY.get).named(result, rows))

    return run


def test_arguments(values):
    texts = np.array([[b"a", "ä".encode()]], dtype=object)
    as_text = {"kind": "array", "text": True}
    assert values.argument(texts, as_text).tolist() == [["a", "ä"]]
    assert values.argument(texts, {"kind": "list", "text": True}) == [["a", "ä"]]
    assert values.argument(texts[:, :1], {"kind": "scalar", "text": False}) == b"a"
    one = values.argument(np.array([3]), {"kind": "scalar", "text": False})
    assert (type(one), one) == (int, 3)
    array = np.ones((2, 2))
    assert values.argument(array, {"kind": "array", "text": False}) is array
    with pytest.raises(UnicodeDecodeError):
        values.argument(np.array([b"\xff"], dtype=object), as_text)


@pytest.mark.parametrize(
    "result",
    [
        {"score": [0.5, 1], "label": "cat"},
        ("cat", [0.5, 1]),
        ["cat", (0.5, 1)],
        Pair("cat", np.array([0.5, 1])),
        Both("cat", np.array([0.5, 1], np.float32)),
    ],
)
def test_several_outputs(named, result):
    found = named(result, ("label", "BYTES", [1]), ("score", "FP32", [-1]))
    assert found["label"].tolist() == ["cat"]
    assert (found["score"].dtype, found["score"].tolist()) == (np.float32, [0.5, 1])


def test_one_output(named):
    assert named(3, ("n", "INT64", [1]))["n"].tolist() == [3]
    assert named({"n": 3}, ("n", "INT64", [-1]))["n"].tolist() == [3]
    assert named((np.array([3]),), ("n", "INT64", [-1]))["n"].tolist() == [3]
    assert named([1, 255], ("n", "UINT8", [2]))["n"].dtype == np.uint8
    assert named(np.array(["a", "bc"]), ("t", "BYTES", [-1]))["t"].tolist() == ["a", "bc"]
    assert named([b"a\x00"], ("t", "BYTES", [-1]))["t"].tolist() == [b"a\x00"]


@pytest.mark.parametrize(
    ("result", "spec", "rows", "told"),
    [
        ([1.5], ("n", "INT64", [1]), None, "float64 for the output 'n', but the signature says INT64"),
        ([256], ("n", "UINT8", [1]), None, "int64 for the output 'n'"),
        (None, ("n", "INT64", [1]), None, "returned None for the output 'n': is a `return` missing"),
        (None, ("t", "BYTES", [1]), None, "returned None for the output 't'"),
        (
            [1, 2],
            ("n", "INT64", [3]),
            None,
            r"the shape \[2\] for the output 'n', but the signature says \[3\]",
        ),
        ([[1]], ("n", "INT64", [-1]), None, r"the shape \[1, 1\]"),
        ([1, 2], ("n", "INT64", [-1]), 3, "got 3 rows and returned 2"),
        ([1], ("t", "BYTES", [-1]), None, "a int in the output 't', which is BYTES"),
        ({"m": 1}, ("n", "INT64", [1]), None, r"the outputs \['m'\], but the signature has \['n'\]"),
    ],
)
def test_a_result_that_contradicts_the_signature(named, result, spec, rows, told):
    with pytest.raises((TypeError, ValueError), match=told):
        named(result, spec, rows=rows)


def test_too_few_values(named):
    with pytest.raises(ValueError, match="3 values for the outputs"):
        named((1, 2, 3), ("a", "INT64", [1]), ("b", "INT64", [1]))
    with pytest.raises(ValueError, match="a int for the outputs"):
        named(1, ("a", "INT64", [1]), ("b", "INT64", [1]))
