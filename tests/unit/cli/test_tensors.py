"""Tensors from and to files and JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from tidegate.cli import tensors
from tidegate.cli.exit_codes import UsageError


def test_json_by_name_bare_and_as_oip() -> None:
    assert tensors.from_json('{"x": [1, 2]}') == {"x": [1, 2]}
    assert tensors.from_json("[[1.5]]") == [[1.5]]
    found = tensors.from_json(
        '{"inputs": [{"name": "x", "datatype": "INT8", "shape": [2, 1], "data": [1, 2]}]}'
    )
    assert found["x"].dtype == np.int8
    assert found["x"].shape == (2, 1)


@pytest.mark.parametrize(
    "text",
    [
        "[1",
        '{"inputs": [{"name": "x"}]}',
        '{"inputs": [{"name": "x", "datatype": "FP32", "shape": [3], "data": [1]}]}',
        '{"inputs": [{"name": "x", "datatype": "INT8", "shape": [1], "data": [1.5]}]}',
        '{"inputs": [{"name": "x", "datatype": "NOPE", "shape": [1], "data": [1]}]}',
        '{"inputs": [3]}',
    ],
)
def test_what_is_no_input(text: str) -> None:
    with pytest.raises(UsageError):
        tensors.from_json(text)


def test_files(tmp_path: Path) -> None:
    array = np.arange(4, dtype=np.int16)
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "a.npz", x=array)
    (tmp_path / "a.json").write_text("[1]")
    assert tensors.from_file(tmp_path / "a.npy").tolist() == [0, 1, 2, 3]
    assert tensors.from_file(tmp_path / "a.npz")["x"].dtype == np.int16
    assert tensors.from_file(tmp_path / "a.json") == [1]


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", b""), ("a.npy", b"x"), ("b.npy", None), ("a.npz", b"PK")]
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError):
        tensors.from_file(tmp_path / name)


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    np.save(tmp_path / "p.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UsageError):
        tensors.from_file(tmp_path / "p.npy")


def test_save(tmp_path: Path) -> None:
    outputs: dict[str, Any] = {"y": np.array([[1.5]], np.float32), "s": np.array([b"a"], dtype=object)}
    tensors.save(outputs, tmp_path / "o.npz")
    assert tensors.from_file(tmp_path / "o.npz")["s"].tolist() == [b"a"]
    tensors.save(outputs, tmp_path / "o.json")
    assert orjson.loads((tmp_path / "o.json").read_bytes()) == {"y": [[1.5]], "s": ["a"]}
    tensors.save({"y": outputs["y"]}, tmp_path / "o.npy")
    assert np.load(tmp_path / "o.npy").tolist() == [[1.5]]
    for name in ("o.npy", "o.txt", "none/o.npz"):
        with pytest.raises(UsageError):
            tensors.save(outputs, tmp_path / name)
