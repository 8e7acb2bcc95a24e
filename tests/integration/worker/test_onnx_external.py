"""An ONNX model with external data, as the CLI packs it, the registry reads it and a worker serves it."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from services.registry.adapters import artifact_inspection
from services.worker.adapters.triton_client import ModelInferRequest
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.package import packed
from tidegate.kernel.archives import is_archive
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.archives import ArchiveLimits
from tidegate.kernel.protocol.models import Signature

pytestmark = pytest.mark.integration

WEIGHTS = np.arange(8, dtype=np.float32).reshape(4, 2)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """``x @ WEIGHTS`` with the weights in ``deep/w.data``."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])],
        [numpy_helper.from_array(WEIGHTS, "w")],
    )
    folder = tmp_path / "net"
    (folder / "deep").mkdir(parents=True)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(made, folder / "net.onnx", save_as_external_data=True, location="deep/w.data", size_threshold=0)
    return folder / "net.onnx"


def look(path: Path) -> Signature | None:
    return artifact_inspection.inspect(
        path, "onnx", model="net", user_signature=None, max_batch=64, limits=ArchiveLimits()
    ).signature


def upload(path: Path, target: Path) -> Path:
    with packed(path) as package:
        assert package.format == "onnx"
        target.write_bytes(b"".join(package.chunks()))
    return target


async def test_a_file_or_its_folder_is_packed_read_and_served(
    model: Path, tmp_path: Path, run: Callable[..., Awaitable[Any]]
) -> None:
    by_file, by_folder = upload(model, tmp_path / "a"), upload(model.parent, tmp_path / "b")
    assert by_file.read_bytes() == by_folder.read_bytes(), "the same files are the same artifact"
    signature = look(by_file)
    assert signature is not None
    assert [(each.name, each.shape) for each in signature.outputs] == [("y", [2])]
    running = await run("onnx", by_file, signature, "net")
    x = np.eye(4, dtype=np.float32)
    message = ModelInferRequest(model_name="net")
    message.inputs.add(name="x", datatype="FP32", shape=x.shape)
    message.raw_input_contents.append(x.tobytes())
    answer = await running.client.infer(message, 30)
    assert np.frombuffer(answer.raw_output_contents[0], np.float32).tolist() == WEIGHTS.ravel().tolist()


def archived(files: dict[str, bytes], target: Path) -> Path:
    with tarfile.open(target, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return target


def test_what_the_registry_refuses(model: Path, tmp_path: Path) -> None:
    net, data = model.read_bytes(), (model.parent / "deep" / "w.data").read_bytes()
    whole = {"net.onnx": net, "deep/w.data": data}
    assert is_archive(archived(whole, tmp_path / "good.tar"))
    assert look(tmp_path / "good.tar") is not None
    for files, words in (
        ({"net.onnx": net}, "but the archive has no such file"),
        ({"net.onnx": net, "w.data": data}, "no such file. Its other files: w.data"),
        (whole | {"deep/w.data": data[:-1]}, "which has only 31 bytes"),
        (whole | {"other.onnx": net}, "exactly one .onnx file"),
        (whole | {"onnxruntime.py": b"evil"}, "must not have code, but it has onnxruntime.py"),
        (whole | {"../w.data": data}, "below its root"),
        ({"net.onnx": net.replace(b"deep/w.data", b"../../w.dat"), "w.data": data}, "no such file"),
    ):
        with pytest.raises(BadRequest) as refused:
            look(archived(files, tmp_path / "bad.tar"))
        assert words in refused.value.message
    with pytest.raises(BadRequest, match="`tidegate deploy` uploads it too"):
        look(model)


def test_what_the_cli_refuses(model: Path) -> None:
    for location, words in (
        (b"../../w.dat", "not below its folder"),
        (b"deep/x.data", "is missing"),
        (b".ssh/id_rsa", "hidden files are not"),
    ):
        other = model.with_name("other.onnx")
        other.write_bytes(model.read_bytes().replace(b"deep/w.data", location))
        with pytest.raises(UsageError, match=words), packed(other):
            pass
