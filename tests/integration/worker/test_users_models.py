"""Triton model directories as users have them: their own configuration, versions, files and connections."""

import asyncio
import zipfile
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.worker.adapters.triton_client import ModelInferRequest, TritonClient
from services.worker.adapters.warmup import warm_up
from tidegate.kernel.errors import ModelFailed

pytestmark = pytest.mark.integration

RUNTIMES = Path(__file__).parents[3] / "services" / "worker" / "runtimes"
Run = Callable[..., Awaitable[Any]]
Archive = Callable[[Mapping[str, str | Path]], Path]
NUMPY = {"FP32": "<f4", "INT64": "<i8"}

PICKY = """
import json
from rows import Rows


class TritonPythonModel:
    def initialize(self, args):
        self.execute = Rows(json.loads(args["model_config"]), self.run).execute

    def run(self, feed, names):
        if (feed["x"] < 0).any():
            raise ValueError(f"no {feed['x'].min():g} in {len(feed['x'])} rows")
        return [feed["x"] * 10]
"""
TIMES = """
import numpy as np, pathlib, triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        factor = float((pathlib.Path(__file__).parent / "data" / "factor.txt").read_text())
        answers = []
        for request in requests:
            x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
            bias = pb_utils.get_input_tensor_by_name(request, "bias")
            y = x * np.float32(factor) + (0 if bias is None else bias.as_numpy())
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("y", y.astype("f4"))]))
        return answers
"""
XY = (
    'backend: "python" max_batch_size: 32\n'
    'input [ { name: "x" data_type: TYPE_FP32 dims: [ 1 ] } ]\n'
    'output [ { name: "y" data_type: TYPE_FP32 dims: [ 1 ] } ]\n'
)


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    """Make a zip of texts and files by name."""

    def make(files: Mapping[str, str | Path]) -> Path:
        path = tmp_path / "model.zip"
        with zipfile.ZipFile(path, "w") as file:
            for name, content in files.items():
                file.writestr(name, content.read_bytes() if isinstance(content, Path) else content)
        return path

    return make


async def ask(client: TritonClient, model: str, **inputs: Any) -> dict[str, Any]:
    message = ModelInferRequest(model_name=model)
    for name, array in inputs.items():
        message.inputs.add(name=name, datatype="FP32", shape=array.shape)
        message.raw_input_contents.append(array.tobytes())
    answer = await client.infer(message, 10)
    return {
        output.name: np.frombuffer(raw, NUMPY[output.datatype]).reshape(output.shape)
        for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)
    }


def column(*values: float) -> Any:
    return np.array(values, "f4").reshape(-1, 1)


async def test_a_bad_row_does_not_fail_those_that_share_its_call(run: Run, archive: Archive) -> None:
    batching = "dynamic_batching { max_queue_delay_microseconds: 100000 preferred_batch_size: [ 32 ] }\n"
    files: dict[str, str | Path] = {
        "m/config.pbtxt": XY + batching, "m/1/model.py": PICKY, "m/1/rows.py": RUNTIMES / "rows.py",
    }  # fmt: skip
    running = await run("triton", archive(files), None)
    requests = [column(1, 2), column(3), column(-4, 5), column(6), column(-7), column(8, 9, 10)]
    answers = await asyncio.gather(*(ask(running.client, "m", x=x) for x in requests), return_exceptions=True)
    for x, answer in zip(requests, answers, strict=True):
        if (x < 0).any():
            assert isinstance(answer, ModelFailed)
            # Its own row and its own batch: it was asked alone.
            assert f"no {x.min():g} in {len(x)} rows" in answer.message
        else:
            assert not isinstance(answer, BaseException)
            assert np.array_equal(answer["y"], x * 10)
    statistics = await running.client.statistics("m")
    assert statistics.execution_count < len(requests), "they came together"


async def test_an_optional_input(run: Run, archive: Archive) -> None:
    optional = 'input [ { name: "bias" data_type: TYPE_FP32 dims: [ 1 ] optional: true } ]\n'
    files = {"m/config.pbtxt": XY + optional, "m/1/model.py": TIMES, "m/1/data/factor.txt": "2"}
    running = await run("triton", archive(files), None)
    signature = await running.client.signature("m")
    assert [(t.name, t.optional) for t in signature.inputs] == [("x", False), ("bias", True)]
    await warm_up(running.client, "m", signature)
    assert (await ask(running.client, "m", x=column(1, 2)))["y"].tolist() == [[2], [4]]
    assert (await ask(running.client, "m", x=column(1, 2), bias=column(5, 5)))["y"].tolist() == [[7], [9]]


@pytest.mark.parametrize(
    ("policy", "factor"), [("", 10), ("version_policy { specific { versions: [ 2 ] } }", 2)]
)
async def test_the_highest_version_folder_or_the_one_that_is_named(
    run: Run, archive: Archive, policy: str, factor: int
) -> None:
    files = {
        f"m/{n}/{name}": text
        for n in (2, 10)
        for name, text in (("model.py", TIMES), ("data/factor.txt", str(n)))
    }
    running = await run("triton", archive({"m/config.pbtxt": XY + policy, **files}), None)
    assert (await ask(running.client, "m", x=column(1)))["y"].tolist() == [[factor]]


async def test_instances_and_threads_where_the_configuration_says_nothing(run: Run, archive: Archive) -> None:
    files = {"m/1/model.py": TIMES, "m/1/data/factor.txt": "1", "m/labels.txt": "a\n"}
    labelled = XY.replace("dims: [ 1 ] } ]\n", 'dims: [ 1 ] label_filename: "labels.txt" } ]\n').replace(
        'label_filename: "labels.txt" ', "", 1
    )
    running = await run("triton", archive({"m/config.pbtxt": labelled, **files}), None, instances=2)
    assert await running.client.instances("m") == 2
    own = "instance_group [ { count: 3 kind: KIND_CPU } ]"
    running = await run("triton", archive({"m/config.pbtxt": XY + own, **files}), None, instances=2)
    assert await running.client.instances("m") == 3


async def test_an_onnx_directory_on_a_triton_without_that_backend(
    run: Run, archive: Archive, models: Path
) -> None:
    """NVIDIA's image has the backend. The wheel serves the same directory with Tidegate's runtime."""
    config = """
    name: "digits" platform: "onnxruntime_onnx" max_batch_size: 16 default_model_filename: "net.onnx"
    input [ { name: "image" data_type: TYPE_FP32 dims: [ 64 ] } ]
    output [
      { name: "label" data_type: TYPE_INT64 dims: [ 1 ] reshape { shape: [ ] } },
      { name: "probabilities" data_type: TYPE_FP32 dims: [ 10 ] }
    ]
    dynamic_batching { }
    """
    with np.load(models / "heldout.npz") as file:
        images, labels = file["image"][:16], file["label"][:16]
    files: dict[str, str | Path] = {"digits/config.pbtxt": config, "digits/3/net.onnx": models / "model.onnx"}
    running = await run("triton", archive(files), None, "digits")
    answer = await ask(running.client, "digits", image=images)
    assert answer["label"].ravel().tolist() == labels.tolist()
    # Without a configuration the file describes itself; a scalar per row keeps its axis in the dims.
    running = await run("triton", archive({"1/model.onnx": models / "model.onnx"}), None, "digits")
    signature = await running.client.signature("digits")
    assert [(t.name, t.datatype, t.shape) for t in signature.inputs] == [("image", "FP32", [-1, 64])]
    assert signature.max_batch_size == 0
    assert (await ask(running.client, "digits", image=images))["label"].tolist() == labels.tolist()


async def test_a_python_model_that_calls_another_one(run: Run, archive: Archive) -> None:
    caller = """
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            x = pb_utils.get_input_tensor_by_name(request, "x")
            question = pb_utils.InferenceRequest(model_name="inner", requested_output_names=["y"], inputs=[x])
            inner = question.exec()
            if inner.has_error():
                answers.append(pb_utils.InferenceResponse([], pb_utils.TritonError(inner.error().message())))
                continue
            y = pb_utils.get_output_tensor_by_name(inner, "y").as_numpy() + 1
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("y", y)]))
        return answers
"""
    files = {
        "m/config.pbtxt": XY, "m/1/model.py": caller,
        "inner/config.pbtxt": XY, "inner/1/model.py": TIMES, "inner/1/data/factor.txt": "3",
    }  # fmt: skip
    running = await run("triton", archive(files), None)
    assert running.model == "m"
    assert (await ask(running.client, "m", x=column(1, 2)))["y"].tolist() == [[4], [7]]
