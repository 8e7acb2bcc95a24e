"""The kinds of files that cannot be served. Most kinds have a text that tells the user what to do."""

from __future__ import annotations

import re

from services.registry.domain.recognition import Glimpse, Kind, Test, both, has_at, holds, matches, starts
from tidegate.kernel.protocol.models import Format

_DOWNLOAD = "This is not the model's file. Download the model again."
_IN_CODE: frozenset[Format] = frozenset({"python", "oip", "llm"})
_TORCH_SAVE = (
    "The file has weights but no code. Without your Python classes it cannot be loaded. Save the whole "
    "model: torch.jit.save(torch.jit.script(model), 'model.pt'), or export it with torch.onnx.export."
)
_DATA = "This file is data. Use it as the baseline of a model: `tidegate deploy MODEL --baseline FILE`."
_KERAS = "Export the model with model.export('folder'). Then: tidegate deploy folder"
_XGBOOST = "Save the model with booster.save_model('model.ubj')."


def has_file(path: str) -> Test:
    """Return a function that returns True for an archive with a file at this path."""
    return lambda glimpse: path in (glimpse.members or ())


def _is_empty(glimpse: Glimpse) -> bool:
    return not glimpse.size


def _is_torch_save(glimpse: Glimpse) -> bool:
    return "data.pkl" in glimpse.below and not any(path.startswith("code/") for path in glimpse.below)


def _is_old_xgboost(glimpse: Glimpse) -> bool:
    head = glimpse.head[:512]
    named = re.search(rb"(reg|binary|multi|rank|count|survival):[a-z]+", head) is not None
    return named and b"gb" in head and glimpse.text is None


def _is_npz(glimpse: Glimpse) -> bool:
    return bool(glimpse.members) and all(name.endswith(".npy") for name in glimpse.members or ())


def _is_wheel(glimpse: Glimpse) -> bool:
    return any(".dist-info/" in name for name in glimpse.members or ())


def _is_java(glimpse: Glimpse) -> bool:
    return "META-INF/MANIFEST.MF" in (glimpse.members or ())


def _is_core_ml(glimpse: Glimpse) -> bool:
    return glimpse.ends(".mlmodel") and glimpse.head[:1] == b"\x08"


def _is_saved_model_file(glimpse: Glimpse) -> bool:
    return glimpse.ends("saved_model.pb") or (
        glimpse.ends(".pb") and glimpse.head.startswith(b"\x08\x01\x12")
    )


def _is_frozen_graph(glimpse: Glimpse) -> bool:
    return glimpse.ends(".pb") and glimpse.head[:1] == b"\x0a"


def _is_safetensors(glimpse: Glimpse) -> bool:
    return glimpse.head[8:10] == b'{"' and int.from_bytes(glimpse.head[:8], "little") < 2**32


def _is_office(glimpse: Glimpse) -> bool:
    return "[Content_Types].xml" in glimpse.root


FOREIGN: tuple[Kind, ...] = (
    Kind(
        "an archive for TorchServe",
        has_file("MAR-INF/MANIFEST.json"),
        remedy="Import the archive: tidegate import torchserve FILE.",
    ),
    Kind(
        "a SageMaker model with an inference script",
        has_file("code/inference.py"),
        remedy="Import the archive: tidegate import sagemaker FILE.",
    ),
    Kind("empty", _is_empty, remedy="Save the model again."),
    Kind("a PNG image", starts(b"\x89PNG\r\n")),
    Kind("a JPEG image", starts(b"\xff\xd8\xff")),
    Kind("a GIF image", starts(b"GIF87a", b"GIF89a")),
    Kind("a WebP image or a WAV recording", starts(b"RIFF")),
    Kind("a TIFF image", starts(b"II*\0", b"MM\0*")),
    Kind("a PDF document", starts(b"%PDF-")),
    Kind("a video", has_at(4, b"ftyp")),
    Kind("an Office document", _is_office),
    Kind(
        "a program for Linux or a shared library",
        starts(b"\x7fELF"),
        remedy="A model is data, not a program.",
    ),
    Kind("a program for Windows", matches(rb"MZ.{58}"), remedy="A model is data, not a program."),
    Kind("a program for macOS", starts(b"\xcf\xfa\xed\xfe", b"\xca\xfe\xba\xbe")),
    Kind("an SQLite database", starts(b"SQLite format 3\0")),
    Kind("a Parquet table", starts(b"PAR1"), remedy=_DATA),
    Kind("an Arrow table", starts(b"ARROW1")),
    Kind(
        "a numpy array",
        starts(b"\x93NUMPY"),
        remedy=("An array is not a model. Put it beside a model.py, and deploy the folder."),
    ),
    Kind(
        "an archive of numpy arrays (.npz)",
        _is_npz,
        remedy="Arrays are not a model. Put them beside a model.py, and deploy the folder.",
    ),
    Kind("a Keras or HDF5 file (.h5)", starts(b"\x89HDF\r\n"), remedy=_KERAS),
    Kind("a Keras file (.keras)", holds("config.json", "model.weights.h5"), remedy=_KERAS),
    Kind(
        "one file of a TensorFlow SavedModel",
        _is_saved_model_file,
        remedy="Deploy its whole folder, with variables/ beside saved_model.pb.",
    ),
    Kind(
        "a frozen TensorFlow graph (.pb)",
        _is_frozen_graph,
        remedy=(
            "Convert the graph: python -m tf2onnx.convert --graphdef FILE --inputs X:0 --outputs Y:0 "
            "--output model.onnx"
        ),
    ),
    Kind("a Core ML model", _is_core_ml, remedy="Export the model to ONNX from its original framework."),
    Kind(
        "a PyTorch file of torch.save (a state_dict or a module), not TorchScript",
        _is_torch_save,
        remedy=_TORCH_SAVE,
    ),
    Kind(
        "a PyTorch file of torch.save (old form), not TorchScript",
        starts(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."),
        remedy=_TORCH_SAVE,
    ),
    Kind(
        "a safetensors file, which has weights but no description of the model",
        _is_safetensors,
        remedy="Deploy the folder with its config.json.",
    ),
    Kind(
        "an XGBoost model in the old binary form",
        starts(b"binf"),
        remedy=(f"XGBoost 3 cannot read this form. {_XGBOOST}"),
    ),
    Kind(
        "an XGBoost model in the old binary form",
        _is_old_xgboost,
        remedy=(f"XGBoost 3 cannot read this form. {_XGBOOST}"),
    ),
    Kind(
        "a GGML file of an old llama.cpp",
        starts(b"lmgg", b"tjgg", b"ggjt"),
        remedy=("Convert the file to GGUF."),
    ),
    Kind("a Python wheel", _is_wheel, remedy="Name the package in --requirements FILE of a Python model."),
    Kind("a Java archive", _is_java, remedy="Export the model to ONNX."),
    Kind("a 7z archive", starts(b"7z\xbc\xaf\x27\x1c"), remedy="Pack the folder as zip or tar.gz."),
    Kind("a RAR archive", starts(b"Rar!"), remedy="Pack the folder as zip or tar.gz."),
    Kind("compressed with zstd", starts(b"\x28\xb5\x2f\xfd"), remedy="Unpack it first."),
    Kind("an R object (.rds)", matches(rb"RDX[23]\n|X\n\0\0\0"), remedy="Export the model to ONNX or PMML."),
    Kind(
        "a pointer of Git LFS, not the file itself",
        starts(b"version https://git-lfs"),
        remedy="Run `git lfs pull` in the repository, then deploy the file.",
    ),
    Kind(
        "a web page (HTML), perhaps a login or error page",
        matches(rb"\s*(?:<!--.{0,500}?-->\s*)?<(?:!doctype html|!DOCTYPE html|html|HTML|head)"),
        remedy=_DOWNLOAD,
    ),
)


def _is_text(glimpse: Glimpse) -> bool:
    return glimpse.text is not None


def _json_with(*keys: str) -> Test:
    """Return a function that returns True for a JSON document with one of these keys near its start."""
    return lambda glimpse: _is_json(glimpse) and any(f'"{key}"'.encode() in glimpse.head for key in keys)


def _is_json(glimpse: Glimpse) -> bool:
    return glimpse.head.lstrip()[:1] in (b"{", b"[") and glimpse.text is not None


def _is_mlmodel(glimpse: Glimpse) -> bool:
    return glimpse.text is not None and (glimpse.filename == "MLmodel" or "\nflavors:" in glimpse.text)


def _is_table(glimpse: Glimpse) -> bool:
    return glimpse.text is not None and glimpse.ends(".csv", ".tsv", ".jsonl")


_TEXT_PYTHON = both(_is_text, matches(rb"(?:.*\n)?(?:import |from \S+ import |def |class )\w"))

TEXTS: tuple[Kind, ...] = (
    Kind(
        "LightGBM's JSON dump (dump_model)",
        both(_json_with("tree_info", "max_feature_idx"), _json_with("version")),
        remedy="Save the model with booster.save_model('model.txt').",
    ),
    Kind(
        "a text of XGBoost's dump_model, which XGBoost cannot load",
        matches(rb'\s*\[\s*\{\s*"nodeid"|booster\[\d+\]:'),
        remedy=_XGBOOST,
    ),
    Kind(
        "a CatBoost model as JSON",
        _json_with("oblivious_trees", "features_info"),
        remedy="Save it with model.save_model('model.cbm').",
    ),
    Kind("a description of a Keras model, without its weights", _json_with("class_name"), remedy=_KERAS),
    Kind(
        "the configuration of a Hugging Face model",
        _json_with("architectures", "model_type"),
        remedy="Deploy its whole folder, with the weights and the tokenizer.",
    ),
    Kind("a notebook", _json_with("cells"), remedy="Put `def predict` into a .py file, and deploy that."),
    Kind(
        "the description of an upstream",
        _json_with("upstream"),
        fits=frozenset({"oip", "llm"}),
        remedy="Deploy the upstream: `tidegate deploy --upstream ADDRESS --name NAME`.",
    ),
    Kind(
        "a PMML model",
        matches(rb".{0,400}<PMML"),
        remedy="Export the model to ONNX, or save it in the format of its library.",
    ),
    Kind("an XML document", matches(rb"\s*<\?xml")),
    Kind(
        "the MLmodel file of an MLflow model",
        _is_mlmodel,
        remedy="Deploy the whole folder that contains it, with the model's files.",
    ),
    Kind(
        "the configuration of a Triton model",
        lambda glimpse: glimpse.ends(".pbtxt"),
        remedy="Deploy the whole folder that contains it, with the version folders.",
    ),
    Kind("a JSON document", _is_json),
    Kind("a table", _is_table, remedy=_DATA),
    Kind("Python code", _TEXT_PYTHON, fits=_IN_CODE, remedy="Give the file a name that ends in .py."),
    Kind("a text file", _is_text, fits=_IN_CODE),
)
