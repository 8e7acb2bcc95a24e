"""Each format on the real Triton returns the same answers as its library in process."""

import asyncio
import zipfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from services.worker.adapters.triton_client import ModelInferRequest, TritonClient
from services.worker.adapters.warmup import warm_up
from tests.integration.registry.onnx_files import model, value
from tidegate.kernel.errors import BadRequest, DeadlinePassed, ModelFailed
from tidegate.kernel.protocol.models import SequenceSpec, Signature, TensorSpec

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[3]
Run = Callable[..., Awaitable[Any]]
Example = Callable[[str], tuple[Path, Signature]]
NUMPY = {"FP32": "<f4", "FP64": "<f8", "INT64": "<i8"}
DIGITS = Signature(
    inputs=[TensorSpec(name="image", datatype="FP32", shape=[64])],
    outputs=[
        TensorSpec(name="label", datatype="INT64", shape=[]),
        TensorSpec(name="probabilities", datatype="FP32", shape=[10]),
    ],
    max_batch_size=64,
)


def request(model: str, name: str, array: Any, outputs: tuple[str, ...] = ()) -> Any:
    message = ModelInferRequest(model_name=model)
    datatype = {"float32": "FP32", "float64": "FP64"}[array.dtype.name]
    message.inputs.add(name=name, datatype=datatype, shape=array.shape)
    message.raw_input_contents.append(array.tobytes())
    for output in outputs:
        message.outputs.add(name=output)
    return message


async def ask(client: TritonClient, message: Any, timeout_s: float = 10) -> dict[str, Any]:
    answer = await client.infer(message, timeout_s)
    return {
        output.name: np.frombuffer(raw, NUMPY[output.datatype]).reshape(output.shape)
        for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)
    }


async def test_digits_equal_onnxruntime(run: Run, models: Path) -> None:
    running = await run("onnx", models / "model.onnx", DIGITS, "digits")
    assert await running.client.signature("digits") == DIGITS
    await warm_up(running.client, "digits", DIGITS)
    with np.load(models / "heldout.npz") as file:
        heldout = dict(file)
    one_by_one = [
        await ask(running.client, request("digits", "image", image[None])) for image in heldout["image"]
    ]
    batch = await ask(running.client, request("digits", "image", heldout["image"]))
    for answer in ({key: np.concatenate([a[key] for a in one_by_one]) for key in DIGITS_OUTPUTS}, batch):
        assert (answer["label"] == heldout["label"]).all()
        assert np.abs(answer["probabilities"] - heldout["probabilities"]).max() < 1e-5


DIGITS_OUTPUTS = [output.name for output in DIGITS.outputs]


async def test_only_the_outputs_asked_for(run: Run, models: Path) -> None:
    running = await run("onnx", models / "model.onnx", DIGITS, "digits")
    image = np.zeros((2, 64), "f4")
    assert list(await ask(running.client, request("digits", "image", image, ("label",)))) == ["label"]


async def test_what_the_model_does_not_take_is_a_bad_request(run: Run, models: Path) -> None:
    running = await run("onnx", models / "model.onnx", DIGITS, "digits")
    with pytest.raises(BadRequest, match="image"):
        await ask(running.client, request("digits", "image", np.zeros((1, 63), "f4")))
    with pytest.raises(BadRequest, match="pixels"):
        await ask(running.client, request("digits", "pixels", np.zeros((1, 64), "f4")))
    assert await ask(running.client, request("digits", "image", np.zeros((1, 64), "f4")))


async def test_an_output_that_is_no_tensor_says_the_remedy(run: Run, models: Path) -> None:
    signature = Signature(
        inputs=[TensorSpec(name="X", datatype="FP32", shape=[4])],
        outputs=[TensorSpec(name="output_probability", datatype="FP32", shape=[2])],
        max_batch_size=8,
    )
    with pytest.raises(ModelFailed, match="'zipmap': False"):
        await run("onnx", models / "zipmap.onnx", signature)


async def test_sklearn_describes_itself(run: Run, models: Path) -> None:
    running = await run("sklearn", models / "model.joblib", None)
    signature = await running.client.signature("m")
    assert [(t.name, t.datatype, t.shape) for t in signature.inputs] == [("input", "FP64", [4])]
    assert [(t.name, t.datatype, t.shape) for t in signature.outputs] == [
        ("label", "BYTES", []),
        ("probabilities", "FP64", [2]),
    ]
    with np.load(models / "classifier.npz") as file:
        x, label, probabilities = file["x"], file["label"], file["probabilities"]
    answer = await running.client.infer(request("m", "input", x), 10)
    raw = dict(zip((o.name for o in answer.outputs), answer.raw_output_contents, strict=True))
    assert raw["label"] == b"".join(len(text).to_bytes(4, "little") + text for text in label)
    assert np.array_equal(np.frombuffer(raw["probabilities"], "<f8").reshape(-1, 2), probabilities)


async def test_python_model_and_its_errors(
    run: Run, example: Example, until: Callable[..., Awaitable[Any]]
) -> None:
    running = await run("python", *example("sleep"), "sleep", env={"LANG": "C.UTF-8"})
    slept = await ask(running.client, request("sleep", "ms", np.array([[1], [5]], "f4")))
    assert slept["slept"].tolist() == [[1], [5]]
    with pytest.raises(ModelFailed, match="ms must be at least 0, not -1"):
        await ask(running.client, request("sleep", "ms", np.array([[-1]], "f4")))
    with pytest.raises(DeadlinePassed):
        await ask(running.client, request("sleep", "ms", np.array([[500]], "f4")), timeout_s=0.05)
    assert await running.client.ready("sleep")

    async def counted() -> bool:
        return bool((await running.client.statistics("sleep")).inference_count >= 2)

    await until(counted, "Triton counts an inference after it has answered")


async def test_a_load_that_fails_carries_the_exception(run: Run, example: Example, tmp_path: Path) -> None:
    broken = tmp_path / "model.py"
    broken.write_text("import no_such_module_here\nclass TritonPythonModel: ...\n")
    with pytest.raises(ModelFailed, match="No module named 'no_such_module_here'"):
        await run("python", broken, example("sleep")[1])


async def test_dynamic_batches_are_joined(run: Run, models: Path, tmp_path: Path) -> None:
    """With the user's own configuration and Triton's batcher, the runtime gets several requests at once."""
    runtimes = ROOT / "services" / "worker" / "runtimes"
    archive = tmp_path / "m.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(models / "model.onnx", "wrapped/anything/1/model.onnx")
        file.write(runtimes / "onnx" / "model.py", "wrapped/anything/1/model.py")
        file.write(runtimes / "rows.py", "wrapped/anything/1/rows.py")
        file.writestr(
            "wrapped/anything/config.pbtxt",
            'name: "renamed" backend: "python" max_batch_size: 64\n'
            "dynamic_batching { max_queue_delay_microseconds: 20000 }\n"
            'input [ { name: "image" data_type: TYPE_FP32 dims: [ 64 ] } ]\n'
            'output [ { name: "probabilities" data_type: TYPE_FP32 dims: [ 10 ] } ]\n',
        )
    running = await run("triton", archive, None)
    assert running.model == "anything"
    with np.load(models / "heldout.npz") as file:
        images, probabilities = file["image"], file["probabilities"]
    sizes = [1, 3, 2, 5] * 6
    starts = np.cumsum([0, *sizes])
    spans = list(zip(starts, sizes, strict=False))
    answers = await asyncio.gather(
        *(ask(running.client, request("anything", "image", images[begin : begin + n])) for begin, n in spans)
    )
    for (begin, size), answer in zip(spans, answers, strict=True):
        assert np.abs(answer["probabilities"] - probabilities[begin : begin + size]).max() < 1e-5
    statistics = await running.client.statistics("anything")
    assert statistics.execution_count < len(sizes)


async def test_the_implicit_state_of_an_onnx_model(run: Run, tmp_path: Path) -> None:
    """Sequences add their inputs, each in its own state."""
    tensors = [value(name, "batch", 1) for name in ("x", "before", "y", "after")]
    nodes = [
        helper.make_node("Add", ["x", "before"], ["y"]),
        helper.make_node("Identity", ["y"], ["after"]),
    ]
    made = model(tensors[:2], tensors[2:], nodes)
    made.ir_version, made.opset_import[0].version = 8, 13
    archive = tmp_path / "m.zip"
    tensor = "data_type: TYPE_FP32 dims: [ 1 ]"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("sums/1/model.onnx", made.SerializeToString())
        file.writestr(
            "sums/config.pbtxt",
            f'backend: "onnxruntime" max_batch_size: 4 input [ {{ name: "x" {tensor} }} ]\n'
            f'output [ {{ name: "y" {tensor} }} ]\n'
            "sequence_batching { max_sequence_idle_microseconds: 60000000\n"
            "  oldest { max_candidate_sequences: 8 }\n"
            f'  state [ {{ input_name: "before" output_name: "after" {tensor}\n'
            f'    initial_state {{ name: "zero" {tensor} zero_data: true }} }} ] }}\n',
        )
    running = await run("triton", archive, None)
    assert await running.client.sequences([running.model]) == SequenceSpec(
        strategy="oldest", slots=8, idle_ms=60_000
    )

    async def add(sequence: int | str, number: int) -> float:
        message = request(running.model, "x", np.array([[number]], np.float32))
        id_ = message.parameters["sequence_id"]
        if isinstance(sequence, int):
            id_.int64_param = sequence
        else:
            id_.string_param = sequence
        message.parameters["sequence_start"].bool_param = number == 1
        return float((await ask(running.client, message))["y"].item())

    for number in range(1, 6):
        found = await asyncio.gather(*(add(sequence, number) for sequence in (1, 2, "a")))
        assert found == [number * (number + 1) / 2] * 3
    assert await add(1, 1) == 1.0, "it begins again"


async def test_an_ensemble_serves_under_its_own_name(run: Run, example: Example, tmp_path: Path) -> None:
    archive = tmp_path / "m.zip"
    tensor = "data_type: TYPE_FP32 dims: [ 16 ]"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(example("identity")[0], "part/1/model.py")
        file.writestr(
            "part/config.pbtxt",
            f'backend: "python" max_batch_size: 8\n'
            f'input {{ name: "x" {tensor} }} output {{ name: "y" {tensor} }}',
        )
        file.writestr(
            "whole/config.pbtxt",
            f'platform: "ensemble" max_batch_size: 8\n'
            f'input {{ name: "in" {tensor} }} output {{ name: "out" {tensor} }}\n'
            'ensemble_scheduling { step { model_name: "part" model_version: -1 '
            'input_map { key: "x" value: "in" } output_map { key: "y" value: "out" } } }',
        )
    running = await run("triton", archive, None)
    x = np.arange(32, dtype="f4").reshape(2, 16)
    assert np.array_equal((await ask(running.client, request("whole", "in", x)))["out"], x)


async def test_a_backend_that_is_not_here_is_named(run: Run, tmp_path: Path) -> None:
    archive = tmp_path / "m.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("m/config.pbtxt", 'platform: "tensorrt_plan"')
        file.writestr("m/1/model.plan", "x")
    with pytest.raises(ModelFailed, match="'tensorrt'"):
        await run("triton", archive, None)
