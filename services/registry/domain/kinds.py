"""The table of kinds of files. A file is of the first kind in the table whose test matches.

To add a format, add a row to ``SERVED``. The order matters: specific rows come before general ones, such as
"an archive". Files that users send but that cannot be served have rows in ``foreign_kinds.py``.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from services.registry.domain import llm_layout
from services.registry.domain.foreign_kinds import FOREIGN, TEXTS
from services.registry.domain.recognition import Glimpse, Kind, both, has_at, holds, matches, starts
from tidegate.kernel.protocol import mlflow_model
from tidegate.kernel.protocol.archives import home_of
from tidegate.kernel.protocol.hugging_face import IMAGES
from tidegate.kernel.protocol.hugging_face_task import CONFIG
from tidegate.kernel.protocol.models import Format

# Formats of folders. One folder can fit several of these formats, so its publisher may state the format.
FOLDERS: frozenset[Format] = frozenset(
    {"triton", "python", "onnx", "llm", "tensorflow", "mlflow", "huggingface"}
)
PICKLE = re.compile(rb"\x80[\x02-\x05]")
# Magic bytes of the compressions that joblib uses: zlib, gzip, bz2, xz, lzma. LZ4 has its own constant.
COMPRESSED = (
    *(b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda", b"\x1f\x8b"),
    *(b"BZh", b"\xfd7zXZ", b"\x5d\x00"),
)
LZ4 = b"\x04\x22\x4d\x18"
_ONNX = re.compile(rb"\x08[\x01-\x20][\x12\x1a\x22\x28\x32\x3a\x42]")
SAVED_MODEL = "saved_model.pb"


def _is_archive(glimpse: Glimpse) -> bool:
    return glimpse.members is not None


def _is_llm_folder(glimpse: Glimpse) -> bool:
    return llm_layout.is_llm([PurePosixPath(name) for name in glimpse.members or ()])


def _is_onnx_folder(glimpse: Glimpse) -> bool:
    names = glimpse.root
    return sum(name.lower().endswith(".onnx") for name in names) == 1 and "config.pbtxt" not in names


def _is_python_folder(glimpse: Glimpse) -> bool:
    versions = any(name.partition("/")[0].isdecimal() for name in glimpse.members or ())
    return "model.py" in glimpse.root and "config.pbtxt" not in glimpse.root and not versions


def _is_saved_model(glimpse: Glimpse) -> bool:
    tops = {name.partition("/")[0] for name in glimpse.members or ()}
    return SAVED_MODEL in glimpse.root or (len(tops) == 1 and SAVED_MODEL in glimpse.below)


def _is_onnx(glimpse: Glimpse) -> bool:
    # ONNX has no magic bytes, but all exporters write the field with the IR version first. Another field of
    # the model follows. The pattern matches the first field and the tag of the second one.
    return _ONNX.match(glimpse.head) is not None


def _is_pickle(glimpse: Glimpse) -> bool:
    return PICKLE.match(glimpse.head) is not None or PICKLE.match(glimpse.unpacked) is not None


def _is_torchscript(glimpse: Glimpse) -> bool:
    paths = glimpse.below
    return "constants.pkl" in paths and any(path.startswith("code/") for path in paths)


def _is_exported(glimpse: Glimpse) -> bool:
    """Return True for a zip file that torch.export.save wrote, in an old or a new release of torch."""
    programs = [path for path in glimpse.below if path.startswith("models/") and path.endswith(".json")]
    new = "archive_format" in glimpse.below and bool(programs)
    return new or "serialized_exported_program.json" in glimpse.root


def _is_mlflow(glimpse: Glimpse) -> bool:
    return _home_of(glimpse, mlflow_model.FILE) is not None


def _is_hugging_face(glimpse: Glimpse) -> bool:
    home = _home_of(glimpse, CONFIG)
    return home is not None and str(home / IMAGES) in (glimpse.members or ())


def _home_of(glimpse: Glimpse, name: str) -> PurePosixPath | None:
    return home_of([PurePosixPath(path) for path in glimpse.members or ()], name)


def _is_python(glimpse: Glimpse) -> bool:
    return glimpse.ends(".py") and glimpse.text is not None


SERVED: tuple[Kind, ...] = (
    Kind("a GGUF file of a language model", starts(b"GGUF"), "llm"),
    Kind("a TensorFlow Lite model", has_at(4, b"TFL3"), "tflite"),
    Kind("a CatBoost model", starts(b"CBM1"), "catboost"),
    Kind("an XGBoost model", matches(rb'\s*\{\s*"learner"\s*:'), "xgboost"),
    Kind("an XGBoost model", matches(rb'\s*\{\s*"version"\s*:\s*\[[^\]]*\]\s*,\s*"learner"'), "xgboost"),
    Kind("an XGBoost model", matches(rb"\{[LlIUi].{1,8}learner"), "xgboost"),
    Kind("a LightGBM model", matches(rb"tree\r?\nversion="), "lightgbm"),
    Kind("a scikit-learn estimator saved by skops", both(_is_archive, holds("schema.json")), "sklearn"),
    Kind("TorchScript", _is_torchscript, "torchscript"),
    Kind("a program of torch.export", _is_exported, "pt2"),
    Kind("an MLflow model", _is_mlflow, "mlflow", fits=FOLDERS),
    # A folder that looks like a language model can also hold a classifier. `hugging_face_artifact` reads
    # the configuration to decide.
    Kind("a folder of a language model", _is_llm_folder, "llm", fits=FOLDERS),
    Kind("a Hugging Face folder", _is_hugging_face, "huggingface", fits=FOLDERS),
    Kind("a TensorFlow SavedModel", _is_saved_model, "tensorflow", fits=FOLDERS),
    Kind("a folder with an ONNX file", _is_onnx_folder, "onnx", fits=FOLDERS),
    Kind("a folder with model.py", _is_python_folder, "python", fits=FOLDERS),
)

GENERAL: tuple[Kind, ...] = (
    Kind("a pickle", _is_pickle, "sklearn"),
    Kind("a file compressed with lz4", starts(LZ4), "sklearn"),
    Kind("an archive", _is_archive, "triton", fits=FOLDERS, general=True),
    Kind(
        "a zip archive that is damaged",
        starts(b"PK\x03\x04"),
        fits=FOLDERS | {"torchscript", "pt2", "sklearn"},
        remedy="Save or pack it again.",
    ),
    Kind("compressed by gzip", starts(b"\x1f\x8b"), remedy="Unpack it first: gunzip FILE."),
    Kind("a Python file", _is_python, "python"),
    Kind("an ONNX model", _is_onnx, "onnx"),
)

TABLE: tuple[Kind, ...] = (*SERVED, *FOREIGN, *GENERAL, *TEXTS)
