"""The three workloads: their requests in each format that a server may need, and the right answers."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks import places
from benchmarks.errors import BenchmarkFailed

Name = Literal["identity", "digits", "image"]
NAMES: tuple[Name, ...] = ("identity", "digits", "image")
TITLES: Mapping[str, str] = {
    "identity": "W1 identity FP32[1,16], JSON",
    "digits": "W2 digits ONNX, JSON",
    "image": "W3 image FP32[1,3,224,224], 600 KB",
}

Wire = Literal["plain", "raw", "base64", "oip", "oip-binary"]
"""How a server takes a workload: a JSON object of its own, the bytes as they are, bytes in JSON, or the
Open Inference Protocol in JSON or with its binary tensor extension."""

TOLERANCE = 1e-4
HEADER_LENGTH = "Inference-Header-Content-Length"


class WrongAnswer(BenchmarkFailed):
    """A server's answer differs from the model's."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request and the check of its answer. ``check`` raises WrongAnswer."""

    path: str
    body: bytes
    check: Callable[[Mapping[str, str], bytes], None]
    headers: dict[str, str] = field(default_factory=dict)


def exchange(workload: Name, wire: Wire) -> Exchange:
    """Return the request of a workload in the format ``wire``."""
    match wire:
        case "plain":
            return _plain(workload)
        case "raw":
            return Exchange(f"/{workload}", _image().tobytes(), _check_mean_json, _octets())
        case "base64":
            text = base64.b64encode(_image().tobytes()).decode()
            return Exchange(f"/{workload}", json.dumps({"image": text}).encode(), _check_mean_json, _json())
        case "oip":
            return _oip(workload)
        case "oip-binary":
            return _oip_binary()


def heldout() -> Path:
    """Return the path of the example's images and onnxruntime's answers to them."""
    return places.bench_dir() / "digits" / "heldout.npz"


def onnx_model() -> Path:
    """Return the path of the example's ONNX file."""
    return places.bench_dir() / "digits" / "model.onnx"


@cache
def _inputs(workload: Name) -> Any:
    if workload == "identity":
        return np.arange(16, dtype=np.float32)[None] / 8
    if workload == "digits":
        with np.load(heldout()) as kept:
            return kept["image"][:1]
    return _image()


@cache
def _image() -> Any:
    return np.random.default_rng(7).random((1, 3, 224, 224), dtype=np.float32)


def _plain(workload: Name) -> Exchange:
    name = "x" if workload == "identity" else "image"
    body = json.dumps({name: _inputs(workload).tolist()}).encode()

    def check(_: Mapping[str, str], answer: bytes) -> None:
        _compare(workload, {key: np.asarray(value) for key, value in _columns(json.loads(answer)).items()})

    return Exchange(f"/{workload}", body, check, _json())


def _columns(answer: Any) -> dict[str, Any]:
    """Return the outputs by name. Some servers return an object for each row."""
    if isinstance(answer, list):
        return {key: [row[key] for row in answer] for key in answer[0]}
    return dict(answer)


def _oip(workload: Name) -> Exchange:
    array = _inputs(workload)
    name = "x" if workload == "identity" else "image"
    tensor = {"name": name, "shape": array.shape, "datatype": "FP32", "data": array.ravel().tolist()}

    def check(_: Mapping[str, str], answer: bytes) -> None:
        outputs = json.loads(answer)["outputs"]
        _compare(workload, {o["name"]: np.asarray(o["data"]).reshape(o["shape"]) for o in outputs})

    return Exchange(_oip_path(workload), json.dumps({"inputs": [tensor]}).encode(), check, _json())


def _oip_binary() -> Exchange:
    image = _image()
    tensor = {"name": "image", "shape": image.shape, "datatype": "FP32"}
    head = json.dumps(
        {
            "inputs": [tensor | {"parameters": {"binary_data_size": image.nbytes}}],
            "outputs": [{"name": "mean", "parameters": {"binary_data": True}}],
        }
    ).encode()
    headers = _octets() | {HEADER_LENGTH: str(len(head))}
    return Exchange(_oip_path("image"), head + image.tobytes(), _check_mean_binary, headers)


def _check_mean_binary(headers: Mapping[str, str], answer: bytes) -> None:
    length = headers.get(HEADER_LENGTH.lower())
    if length is None:
        raise WrongAnswer("the answer is not binary")
    _compare("image", {"mean": np.frombuffer(answer[int(length) :], np.float32)})


def _check_mean_json(_: Mapping[str, str], answer: bytes) -> None:
    _compare("image", {"mean": np.asarray(json.loads(answer)["mean"])})


def _compare(workload: Name, outputs: Mapping[str, Any]) -> None:
    """Raise WrongAnswer unless the outputs are those of the model."""
    if workload == "image":
        right, given = float(_image().mean(dtype=np.float64)), float(np.ravel(outputs["mean"])[0])
        if not math.isclose(right, given, rel_tol=TOLERANCE):
            raise WrongAnswer(f"the mean is {right}, not {given}")
        return
    for name, right_array in _right(workload).items():
        found = outputs.get(name)
        if found is None or found.size != right_array.size:
            raise WrongAnswer(f"{name}: {right_array.size} values expected, got {found!r}")
        if not np.allclose(found.ravel(), right_array.ravel(), atol=TOLERANCE, rtol=0):
            raise WrongAnswer(f"{name}: expected {right_array.ravel()[:4]}..., got {found.ravel()[:4]}...")


def _right(workload: Name) -> dict[str, Any]:
    if workload == "identity":
        return {"y": _inputs("identity")}
    with np.load(heldout()) as kept:
        return {name: kept[name][:1] for name in ("label", "probabilities")}


def _oip_path(workload: Name) -> str:
    return f"/v2/models/{workload}/infer"


def _json() -> dict[str, str]:
    return {"Content-Type": "application/json"}


def _octets() -> dict[str, str]:
    return {"Content-Type": "application/octet-stream"}
