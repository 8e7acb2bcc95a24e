"""Files of every format are inspected without executing anything in them."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import random
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from services.registry.adapters import artifact_inspection
from tests.integration.registry.onnx_files import model, onnx_bytes, value
from tests.unit.registry.test_pickle_imports import array_of_joblib
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.archives import ArchiveLimits
from tidegate.kernel.protocol.models import Signature, TensorSpec

Look = Callable[..., Signature | None]

CONFIG = """
name: "digits"
max_batch_size: 8
input [ { name: "x" data_type: TYPE_FP32 dims: [ 64 ] } ]
output [ { name: "label" data_type: TYPE_STRING dims: [ 1 ] } ]
a_field_of_tomorrow: { deep: 1 }
"""
ENSEMBLE = CONFIG.replace('"digits"', '"whole"').replace("max_batch_size: 8", 'platform: "ensemble"')


@pytest.fixture
def look(tmp_path: Path) -> Look:
    def run(data: bytes, format_: Any = "onnx", *, limits: ArchiveLimits | None = None, **more: Any) -> Any:
        path = tmp_path / "artifact"
        path.write_bytes(data)
        arguments = {"model": "digits", "user_signature": None, "max_batch": 64, **more}
        return artifact_inspection.inspect(
            path, format_, limits=limits or ArchiveLimits(), **arguments
        ).signature

    return run


def test_onnx_signature_leaves_weights_out(look):
    weights = numpy_helper.from_array(np.ones((64, 10), np.float32), "w")
    made = model(
        inputs=[value("x", "n", 64), value("w", 64, 10), value("t", None, datatype=TensorProto.STRING)],
        outputs=[value("y", "n", 10), value("z", -1, 3, datatype=TensorProto.INT64)],
        nodes=[helper.make_node("MatMul", ["x", "w"], ["y"])],
        initializers=[weights],
    )
    found = look(made.SerializeToString())
    assert found.max_batch_size == 64
    assert [(t.name, t.datatype, t.shape) for t in found.inputs] == [("x", "FP32", [64]), ("t", "BYTES", [])]
    assert [(t.name, t.datatype, t.shape) for t in found.outputs] == [
        ("y", "FP32", [10]),
        ("z", "INT64", [3]),
    ]


def test_onnx_without_batch_axis(look):
    found = look(model(inputs=[value("x", 1, 64)], outputs=[value("y")]).SerializeToString())
    assert (found.max_batch_size, found.inputs[0].shape, found.outputs[0].shape) == (0, [1, 64], [])


def test_onnx_zipmap_is_refused(look):
    inner = helper.make_map_type_proto(
        TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, [])
    )
    zipmap = helper.make_value_info("probabilities", helper.make_sequence_type_proto(inner))
    with pytest.raises(BadRequest, match=r"'probabilities' of the ONNX graph is a sequence.*zipmap"):
        look(model(outputs=[zipmap]).SerializeToString())


@pytest.mark.parametrize("where", ["initializer", "constant", "branch"])
def test_onnx_with_external_data_is_refused(look, where):
    tensor = numpy_helper.from_array(np.ones(4, np.float32), "w")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    constant = helper.make_node("Constant", [], ["c"], value=tensor)
    body = helper.make_graph([constant], "body", [], [value("c", 4)])
    made = {
        "initializer": lambda: model(initializers=[tensor]),
        "constant": lambda: model(nodes=[constant]),
        "branch": lambda: model(nodes=[helper.make_node("If", ["x"], ["y"], then_branch=body)]),
    }[where]()
    with pytest.raises(BadRequest, match="external data"):
        look(made.SerializeToString())


def test_onnx_given_signature_is_checked_against_the_file(look):
    user_signature = Signature(
        inputs=[TensorSpec(name="x", datatype="FP32", shape=[64])],
        outputs=[TensorSpec(name="y", datatype="FP32", shape=[64])],
        max_batch_size=3,
    )
    assert look(onnx_bytes(), user_signature=user_signature) == user_signature
    with pytest.raises(BadRequest, match="outputs are"):
        look(
            onnx_bytes(), user_signature=user_signature.model_copy(update={"outputs": user_signature.inputs})
        )


@pytest.mark.parametrize(
    "data", [b"", b"PK\x03\x04 not onnx", b"\x00" * 100, b"\xff" * 100, b"{}", b"\x08\x01"]
)
def test_other_bytes_than_onnx_are_refused(look, data):
    with pytest.raises(BadRequest):
        look(data)


def test_damaged_onnx_is_always_a_bad_request(look):
    whole, dice = onnx_bytes(), random.Random(7)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(dice.randint(1, 6)):
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        try:
            look(bytes(damaged[: dice.randint(1, len(damaged))]))
        except BadRequest:
            pass


def archived(files: dict[str, str], kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, text in files.items():
                archive.writestr(name, text)
        return buffer.getvalue()
    with tarfile.open(fileobj=buffer, mode="w:gz" if kind == "tar.gz" else "w") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
@pytest.mark.parametrize("root", ["", "digits/", "./deep/digits/"])
def test_triton_directory(look, kind, root):
    found = look(archived({f"{root}config.pbtxt": CONFIG, f"{root}1/model.py": "x"}, kind), "triton")
    assert found.max_batch_size == 8
    assert (found.inputs[0].shape, found.outputs[0].datatype) == ([64], "BYTES")


def test_triton_ensemble_is_what_is_served(look):
    files = {"pre/config.pbtxt": CONFIG, "pre/1/model.py": "x", "whole/config.pbtxt": ENSEMBLE}
    assert look(archived(files, "zip"), "triton").max_batch_size == 0


@pytest.mark.parametrize("config", [None, 'backend: "onnxruntime"'])
def test_triton_directory_without_a_signature(look, config):
    files = {"1/model.onnx": "x", **({"config.pbtxt": config} if config else {})}
    assert look(archived(files, "tar"), "triton") is None


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({"config.pbtxt": "input {", "1/model.py": ""}, "config.pbtxt of '.' cannot be read: 1:"),
        ({"config.pbtxt": CONFIG.replace("TYPE_FP32", "TYPE_INVALID")}, "no usable data_type"),
        ({"config.pbtxt": CONFIG.replace("[ 64 ]", "[ 0 ]")}, "each of its dims must be -1 or at least 1"),
        ({"../config.pbtxt": CONFIG}, "below its root"),
        ({"a.txt": "x"}, "not a Triton model directory"),
    ],
)
@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_triton_directories_that_are_refused(look, files, match, kind):
    with pytest.raises(BadRequest, match=match):
        look(archived(files, kind), "triton")


def test_links_bombs_and_broken_archives_are_refused(look):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        link = tarfile.TarInfo("1/model.py")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(BadRequest, match="is a link"):
        look(buffer.getvalue(), "triton")
    info = zipfile.ZipInfo("1/model.py")
    info.external_attr = 0o120777 << 16
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(BadRequest, match="is a link"):
        look(buffer.getvalue(), "triton")
    bomb = archived({"1/a": "0" * 2000}, "tar.gz")
    with pytest.raises(BadRequest, match="unpacks to more than 1000 bytes"):
        look(bomb, "triton", limits=ArchiveLimits(unpacked_bytes=1000))
    for rubbish in (b"PK\x03\x04 broken", b"\x1f\x8b broken", b"broken", archived({"a": "b"}, "zip")[:-30]):
        with pytest.raises(BadRequest, match="cannot be read"):
            look(rubbish, "triton")


def test_tar_with_an_endless_header(look):
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 5 * 1024**2
    with pytest.raises(BadRequest, match="cannot be read"):
        look(header.tobuf() + b"0" * 5 * 1024**2, "triton")


def test_damaged_archives_are_always_a_bad_request(look):
    dice = random.Random(7)
    for kind in ("zip", "tar", "tar.gz"):
        whole = archived({"config.pbtxt": CONFIG, "1/model.py": "x" * 100}, kind)
        for _ in range(100):
            damaged = bytearray(whole)
            for _ in range(dice.randint(1, 20)):
                damaged[dice.randrange(len(damaged))] = dice.randrange(256)
            try:
                look(bytes(damaged), "triton")
            except BadRequest:
                pass


def test_torchscript(look):
    script = archived({"m/constants.pkl": "", "m/code/__torch__.py": "", "m/data.pkl": ""}, "zip")
    with pytest.raises(BadRequest, match=r"A TorchScript file does not declare .* Add a signature"):
        look(script, "torchscript")
    assert look(script, "torchscript", user_signature=SIGNATURE) == SIGNATURE
    with pytest.raises(BadRequest, match="weights but no code"):
        look(archived({"m/data.pkl": "", "m/data/0": ""}, "zip"), "torchscript")
    with pytest.raises(BadRequest, match=r"torch\.jit\.save"):
        look(b"rubbish", "torchscript")


def test_python_model(look, tmp_path):
    proof = tmp_path / "ran"
    source = f"open({str(proof)!r}, 'w')\nclass TritonPythonModel:\n    def execute(self, requests): ...\n"
    assert look(source.encode(), "python", user_signature=SIGNATURE) == SIGNATURE
    with pytest.raises(BadRequest, match=r"A Python model does not declare .* Add a signature"):
        look(source.encode(), "python")
    described = source + "    @staticmethod\n    def auto_complete_config(config): ...\n"
    assert look(described.encode(), "python") is None
    assert not proof.exists(), "it is parsed, never run"
    with pytest.raises(BadRequest, match="not valid Python"):
        look(b"def broken(", "python")
    with pytest.raises(BadRequest, match="class TritonPythonModel"):
        look(b"x = 1", "python")


SIGNATURE = Signature(
    inputs=[TensorSpec(name="x", datatype="FP32", shape=[4])],
    outputs=[TensorSpec(name="y", datatype="FP32", shape=[4])],
)


class Trap:
    """An object that shows when it was unpickled."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("it was unpickled",))


def test_joblib_is_never_loaded(look):
    assert look(pickle.dumps(Trap()), "sklearn", allow_pickle=True) is None
    with pytest.raises(BadRequest, match=r"joblib\.dump"):
        look(b"rubbish", "sklearn", allow_pickle=True)


PACKED: list[Callable[[bytes], bytes]] = [bytes, zlib.compress, gzip.compress, bz2.compress, lzma.compress]


@pytest.mark.parametrize("pack", PACKED)
def test_a_pickle_that_runs_programs_needs_a_second_flag(look, pack):
    # joblib writes an array between the opcodes.
    array = array_of_joblib(np.dtype("f8"), (100_000,), b"\xff" * 800_000, b"cposix\nsystem\n")
    data = pack(array)
    with pytest.raises(BadRequest, match="allow_pickle=true"):
        look(data, "sklearn")
    with pytest.raises(BadRequest, match=r"imports posix\.system.*--trust posix\.system"):
        look(data, "sklearn", allow_pickle=True)
    look(data, "sklearn", allow_pickle=True, trust=["posix.system"])
    with pytest.raises(BadRequest, match="cannot be checked"):
        look(pack(array[:-3]), "sklearn", allow_pickle=True)


@pytest.mark.parametrize("file", ["boosted.joblib", "network.pkl"])
def test_an_estimator_imports_nothing_dangerous(look, file):
    data = (Path(__file__).parents[1] / "worker" / "numpy_2" / file).read_bytes()
    assert look(data, "sklearn", allow_pickle=True) is None


def test_picklescan_judges_too(look):
    """A module that only picklescan's list has: it is no part of the standard library."""
    with pytest.raises(BadRequest, match=r"imports aiohttp\.request"):
        look(b"\x80\x02caiohttp\nrequest\n.", "sklearn", allow_pickle=True)
