"""What a file is, by its contents."""

import pytest

from services.registry.domain import kinds
from services.registry.domain.formats import format_by_name
from services.registry.domain.recognition import LABELS, Glimpse, decide, recognise
from tidegate.kernel.errors import BadRequest


def glimpse(filename: str, head: bytes = b"", *members: str, unpacked: bytes = b"") -> Glimpse:
    held = dict.fromkeys(members, 1) if members else None
    return Glimpse(filename, len(head), head, unpacked, held)


def format_of(file: Glimpse, stated=None):
    kind = recognise(file, kinds.TABLE)
    return decide(file.filename, kind, stated, format_by_name(file.filename))


ZIP = b"PK\x03\x04"
XGBOOST = b'{"learner":{"attributes":{},"feature_names":[]'
SERVED = [
    (glimpse("a.bin", b"GGUF\3\0\0\0"), "llm"),
    (glimpse("a.bin", b"\x1c\0\0\0TFL3\0\0"), "tflite"),
    (glimpse("a.bin", b"CBM1\0\0\0\0"), "catboost"),
    (glimpse("a.pkl", XGBOOST), "xgboost"),
    (glimpse("a.txt", b'{ "version":[2,1,0], "learner":{}}'), "xgboost"),
    (glimpse("a.bin", b"{L\0\0\0\0\0\0\0\x07learner{"), "xgboost"),
    (glimpse("a.model", b"tree\nversion=v4\nnum_class=1"), "lightgbm"),
    (glimpse("a.zip", ZIP, "schema.json", "1.npy"), "sklearn"),
    (glimpse("a.bin", ZIP, "a/constants.pkl", "a/code/__torch__.py", "a/data.pkl"), "torchscript"),
    (glimpse("a.zip", ZIP, "config.json", "tokenizer.json", "model.safetensors"), "llm"),
    (glimpse("a.zip", ZIP, "config.json", "preprocessor_config.json", "model.safetensors"), "huggingface"),
    (glimpse("a.zip", ZIP, "MLmodel", "model.onnx", "conda.yaml"), "mlflow"),
    (glimpse("a.zip", ZIP, "m/MLmodel", "m/model.pkl", "m/code/model.py"), "mlflow"),
    (glimpse("a.bin", ZIP, "n/models/model.json", "n/archive_format", "n/data/weights/weight_0"), "pt2"),
    (glimpse("a.zip", ZIP, "saved_model.pb", "variables/variables.index"), "tensorflow"),
    (glimpse("a.zip", ZIP, "m/saved_model.pb", "m/variables/variables.index"), "tensorflow"),
    (glimpse("a.zip", ZIP, "net.onnx", "net.onnx.data"), "onnx"),
    (glimpse("a.zip", ZIP, "model.py", "weights.npy"), "python"),
    (glimpse("a.zip", ZIP, "config.pbtxt", "1/model.py"), "triton"),
    (glimpse("a.zip", ZIP, "config.pbtxt", "1/net.savedmodel/saved_model.pb"), "triton"),
    (glimpse("a.bin", b"\x80\x04\x95\0"), "sklearn"),
    (glimpse("a.joblib", b"\x78\x9c..", unpacked=b"\x80\x04\x95"), "sklearn"),
    (glimpse("a.bin", b"\x08\x09\x12\x07skl2onnx"), "onnx"),
    (glimpse("a.onnx", b"\x08\x08:\x10"), "onnx"),
    (glimpse("a.py", b"import numpy\n"), "python"),
    (glimpse("a.onnx", b"\xff\xff nothing known"), "onnx"),
]


@pytest.mark.parametrize(("file", "found"), SERVED)
def test_contents_decide(file, found):
    assert format_of(file) == found


FOREIGN = [
    (glimpse("m.onnx", b""), "is empty, not"),
    (glimpse("m.onnx", b"\x89PNG\r\n\x1a\n"), "is a PNG image, not an ONNX model"),
    (glimpse("m.pt", ZIP, "m/data.pkl", "m/data/0"), "torch.save.*torch.jit.script"),
    (glimpse("m.pth", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02"), "torch.save .old form"),
    (glimpse("m.h5", b"\x89HDF\r\n\x1a\n"), "Keras or HDF5.*model.export"),
    (glimpse("m.keras", ZIP, "config.json", "metadata.json", "model.weights.h5"), "a Keras file"),
    (glimpse("m.npz", ZIP, "x.npy", "y.npy"), "archive of numpy arrays"),
    (glimpse("m.safetensors", b"\x20\0\0\0\0\0\0\0{\"a\":"), "safetensors.*config.json"),
    (glimpse("m.model", b"binf\0\0\0\0"), r"old binary form.*booster.save_model\('model.ubj'\)"),
    (glimpse("m.bin", b"\0\0\0\x3f" + b"\0" * 132 + b"\x10\0\0\0reg:squarederror\6gbtree"), "old binary"),
    (glimpse("m.txt", b"booster[0]:\n0:[f0<1]"), "XGBoost's dump"),
    (glimpse("m.json", b'[{"nodeid": 0}]'), "XGBoost's dump"),
    (glimpse("m.json", b'{"name":"tree","version":"v4","tree_info":[]'), "LightGBM's JSON dump"),
    (glimpse("m.json", b'{"oblivious_trees": []'), "CatBoost model as JSON"),
    (glimpse("m.json", b'{"class_name": "Sequential"}'), "Keras model, without its weights"),
    (glimpse("config.json", b'{"architectures": ["Bert"]}'), "Hugging Face.*whole folder"),
    (glimpse("m.json", b"{}"), "is a JSON document"),
    (glimpse("m.txt", b"hello\n"), "is a text file"),
    (glimpse("m.txt", b"import numpy as np\n"), "Python code.*ends in .py"),
    (glimpse("m.csv", b"a,b\n1,2\n"), "a table.*--baseline"),
    (glimpse("MLmodel", b"flavors:\n  python_function:\n"), "MLmodel file.*whole folder"),
    (glimpse("config.pbtxt", b'name: "m"\n'), "configuration of a Triton model"),
    (glimpse("m.onnx", b"<!DOCTYPE html>\n<html>"), "a web page"),
    (glimpse("m.onnx", b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    (glimpse("saved_model.pb", b"\x08\x01\x12\x20"), "one file of a TensorFlow SavedModel"),
    (glimpse("graph.pb", b"\x0a\x20"), "frozen TensorFlow graph.*tf2onnx"),
    (glimpse("m.mar", ZIP, "MAR-INF/MANIFEST.json", "net.pt"), "tidegate import torchserve"),
    (glimpse("m.zip", ZIP, "code/inference.py", "model.joblib"), "tidegate import sagemaker"),
    (glimpse("m.bin", b"\x7fELF\x02"), "program for Linux"),
    (glimpse("m.gz", b"\x1f\x8b\x08", unpacked=b"a,b\n"), "compressed by gzip"),
    (glimpse("m.bin", b"\xff\xfe\xfd"), "Neither the contents nor the name"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "words"), FOREIGN)
def test_a_wrong_file_is_named(file, words):
    with pytest.raises(BadRequest, match=words):
        format_of(file)


def test_a_stated_format_must_agree_with_the_contents():
    with pytest.raises(BadRequest, match="is an XGBoost model, not an ONNX model"):
        format_of(glimpse("m.onnx", XGBOOST), "onnx")
    with pytest.raises(BadRequest, match="is a PNG image, not TorchScript"):
        format_of(glimpse("m.pt", b"\x89PNG\r\n"), "torchscript")
    assert format_of(glimpse("m.bin", b"\xff\xfe"), "onnx") == "onnx", "the inspection decides"
    assert format_of(glimpse("a", ZIP, "config.json", "tokenizer.json"), "triton") == "triton"
    assert format_of(glimpse("code.txt", b"def predict(x): ...\n"), "python") == "python"
    assert format_of(glimpse("upstream.json", b'{"upstream": "https://h/v2"}'), "oip") == "oip"


def test_a_damaged_zip_and_an_archive_follow_the_name():
    """A reader of the format then says what is wrong. The contents say too little to contradict the name."""
    assert format_of(glimpse("net.pt", ZIP + b"cut off")) == "torchscript"
    assert format_of(glimpse("m.zip", ZIP + b"cut off")) == "triton"
    with pytest.raises(BadRequest, match="'m' is a zip archive that is damaged"):
        format_of(glimpse("m", ZIP + b"cut off"))
    with pytest.raises(BadRequest, match=r"'m\.json' is an archive, not an XGBoost model"):
        format_of(glimpse("m.json", ZIP, "readme.txt"))
    assert format_of(glimpse("m", ZIP, "readme.txt")) == "triton"


def test_every_format_has_a_label():
    from typing import get_args

    from tidegate.kernel.protocol.models import Format

    assert set(LABELS) == set(get_args(Format))
