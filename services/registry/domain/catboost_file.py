"""Read a CatBoost file (.cbm): features, classes and the release that saved it. Pure.

The file begins with four magic bytes and a length. Then follows a FlatBuffers message with the schema of
CatBoost's model.fbs.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from mmap import mmap
from typing import Any

from services.registry.domain import flatbuffer
from services.registry.domain.flatbuffer import Table
from services.registry.domain.json_outline import Malformed
from services.registry.domain.trees import TreeModel
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.models import Datatype

_MAGIC = 4
CORE_TREES, CORE_INFO = 1, 2
TREES_DIMENSION, TREES_CATEGORIES, TREES_FLOATS, TREES_TEXTS, TREES_EMBEDDINGS = 0, 4, 5, 12, 18
CATEGORY_INDEX, FLOAT_INDEX = 0, 1
_LABELS: dict[str, Datatype] = {"Integer": "INT64", "Float": "FP64", "String": "BYTES"}
_SEVERAL_LABELS = ("MultiLogloss", "MultiCrossEntropy")
_RELEASE = re.compile(r"\bv(\d{1,3}\.\d{1,3}(?:\.\d{1,3})?)\b")


@dataclass(frozen=True, slots=True)
class CatboostFile:
    """The model in a file. ``release``: the CatBoost release that saved it; empty if unknown."""

    model: TreeModel
    release: str


def read(data: mmap | bytes) -> CatboostFile:
    """Return the model and the release in a file.

    Raise Malformed for a damaged file. Raise BadRequest if the model has features that Tidegate cannot serve.
    """
    length = int.from_bytes(data[_MAGIC : _MAGIC + 4], "little")
    begin = _MAGIC + 4
    if begin + length > len(data):
        raise Malformed("the file ends too early, so the copy may be broken")
    core = flatbuffer.root(data, begin, begin + length)
    trees = core.table(CORE_TREES)
    if trees is None:
        raise Malformed("the model has no trees")
    _check_servable(trees)
    info = {each.text(0): each.text(1) for each in core.tables(CORE_INFO)}
    found = _RELEASE.search(info.get("catboost_version_info", ""))
    # Compute the number of features from the highest index. The file may leave out features that no tree
    # uses, so a count of the features in the file can be too low.
    floats = 1 + max((each.number(FLOAT_INDEX, -1) for each in trees.tables(TREES_FLOATS)), default=-1)
    categories = 1 + max(
        (each.number(CATEGORY_INDEX, -1) for each in trees.tables(TREES_CATEGORIES)), default=-1
    )
    model = _model(floats, categories, trees.number(TREES_DIMENSION, 1), info)
    return CatboostFile(model, found[1] if found else "")


def _check_servable(trees: Table) -> None:
    for field, kind in ((TREES_TEXTS, "text"), (TREES_EMBEDDINGS, "embedding")):
        if next(trees.tables(field), None) is not None:
            raise BadRequest(
                f"The CatBoost model has {kind} features, and Tidegate cannot serve these from a CatBoost "
                "file. Put the file beside a model.py with `def predict`, and deploy that folder."
            )


def _model(floats: int, categories: int, dimension: int, info: dict[str, str]) -> TreeModel:
    classes = _object(info.get("class_params"))
    loss = _object(_object(info.get("params")).get("loss_function")).get("type")
    names = classes.get("class_names")
    if isinstance(names, list) and len(names) > 1 and loss not in _SEVERAL_LABELS:
        label = _LABELS.get(str(classes.get("class_label_type")), "INT64")
        return TreeModel(floats, len(names), categories=categories, label=label, answers="FP64")
    outputs = 2 if loss == "RMSEWithUncertainty" else dimension
    return TreeModel(floats, outputs=outputs if outputs > 1 else 0, categories=categories, answers="FP64")


def _object(value: Any) -> dict[str, Any]:
    """Return ``value`` as a dict; empty if it is neither a dict nor the JSON text of one."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
