"""Read the header of a LightGBM text file: features, classes and objective. Pure."""

from __future__ import annotations

from mmap import mmap

from services.registry.domain.json_outline import Malformed
from services.registry.domain.trees import TreeModel

MAX_HEADER = 64 * 1024 * 1024
_MAX_LINE = 256
_FIRST_TREE, _END = b"\nTree=", b"\nend of trees"
_PROBABILITIES = {"multiclass", "multiclassova", "softmax", "ova", "ovr"}


def read(data: mmap | bytes) -> TreeModel:
    """Return the model that a file describes. Raise Malformed if the file is damaged."""
    if data.find(_END) < 0:
        raise Malformed("the file has no line `end of trees`, so the copy may be broken")
    # The header ends at the first tree, or at "end of trees" if the model has no trees.
    end = data.find(_FIRST_TREE, 0, MAX_HEADER)
    end = data.find(_END, 0, MAX_HEADER) if end < 0 else end
    if end < 0:
        raise Malformed(f"the file's header has more than {MAX_HEADER} bytes")
    fields = _fields(data, end)
    features = _number(fields, "max_feature_idx") + 1
    classes, objective = _number(fields, "num_class"), fields.get("objective", "").partition(" ")[0]
    per_iteration = _number(fields, "num_tree_per_iteration", classes)
    if objective == "binary":
        return TreeModel(features, classes=2, floats="FP64", answers="FP64")
    if objective in _PROBABILITIES:
        return TreeModel(features, classes=classes, floats="FP64", answers="FP64")
    outputs = max(classes, per_iteration)
    return TreeModel(features, outputs=outputs if outputs > 1 else 0, floats="FP64", answers="FP64")


def _fields(data: mmap | bytes, end: int) -> dict[str, str]:
    """Return the fields of the header. Long values, such as the names of features, are cut off."""
    fields: dict[str, str] = {}
    at = 0
    while at < end:
        stop = data.find(b"\n", at, end)
        stop = end if stop < 0 else stop
        key, equals, value = data[at : min(stop, at + _MAX_LINE)].partition(b"=")
        if equals:
            fields.setdefault(key.decode("ascii", "replace"), value.decode("ascii", "replace").strip())
        at = stop + 1
        if len(fields) > 1000:
            raise Malformed("the file's header has more than 1,000 fields")
    return fields


def _number(fields: dict[str, str], key: str, default: int | None = None) -> int:
    text = fields.get(key, "" if default is None else str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise Malformed(f"the file's {key} is {text[:40]!r}, not a number")
    return int(text)
