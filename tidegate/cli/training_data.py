"""Compute a version's baseline from a file of training data (CSV, npz or parquet)."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tidegate.cli.api import Doc
from tidegate.cli.exit_codes import UsageError
from tidegate.kernel.profiles.baseline import training_baseline
from tidegate.kernel.profiles.columns import (
    VALUE_BYTES,
    Columns,
    SampledTensor,
    add_tensor,
    element_names,
)
from tidegate.kernel.profiles.predictions import CONFIDENCE, PREDICTION, SCORE
from tidegate.kernel.protocol.tensors import DATATYPES, pack_strings

# The columns of a version's outputs. They have these names in every version.
_OUTPUTS = (PREDICTION, CONFIDENCE, SCORE)
MAX_ROWS = 1_000_000


def baseline_of(path: Path, signature: Doc | None) -> Doc:
    """Return the baseline from a file of training data, in the registry's format.

    ``signature``: the version's signature; None: use all columns of the file.

    Raise UsageError if the file cannot be read or has no usable rows.
    """
    reader = {".csv": _csv, ".npz": _npz, ".parquet": _parquet}.get(path.suffix.lower())
    if reader is None:
        raise UsageError(f"{path}: the baseline's file must end with .csv, .npz or .parquet.")
    try:
        columns = reader(path, signature)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    if not columns.rows or not (columns.numbers or columns.values):
        raise UsageError(f"{path} has no rows, or no column of the version's inputs and outputs.")
    return training_baseline(columns).to_json()


def input_columns(signature: Doc | None) -> list[str]:
    """Return the column names of a version's inputs, in the signature's order.

    An input without a fixed shape has no columns.
    """
    names: list[str] = []
    for each in (signature or {}).get("inputs", ()):
        if all(dim > 0 for dim in each["shape"]):
            names += element_names(each["name"], each["shape"])
    return names


def _csv(path: Path, signature: Doc | None) -> Columns:
    with path.open(newline="") as file:
        rows = csv.reader(file)
        heads = next(rows, [])
        table = [row for _, row in zip(range(MAX_ROWS), rows)]  # noqa: B905 - stop at the shorter sequence
    if wrong := next((at for at, row in enumerate(table, 2) if len(row) != len(heads)), None):
        raise ValueError(
            f"line {wrong} has {len(table[wrong - 2])} cells, and the first line has {len(heads)}"
        )
    return named({head: [row[at] for row in table] for at, head in enumerate(heads)}, len(table), signature)


def _parquet(path: Path, signature: Doc | None) -> Columns:
    try:
        from pyarrow import parquet  # type: ignore[import-not-found]
    except ImportError:
        raise UsageError(
            "Reading parquet needs the package pyarrow. Run `pip install pyarrow`, or give a CSV or npz file."
        ) from None
    found = parquet.read_table(path).slice(0, MAX_ROWS)
    return named({name: found[name].to_pylist() for name in found.column_names}, found.num_rows, signature)


def _npz(path: Path, signature: Doc | None) -> Columns:
    """Read the arrays of the version's inputs and outputs. The rows are along the first axis."""
    with np.load(path, allow_pickle=False) as arrays:
        found = {name: arrays[name][:MAX_ROWS] for name in arrays.files}
    inputs = {each["name"] for each in (signature or {}).get("inputs", ())}
    known = inputs | set(_OUTPUTS)
    chosen = {name: each for name, each in found.items() if not inputs or name in known}
    if not chosen:
        raise UsageError(f"{path} has the arrays {', '.join(found)}. Expected: {', '.join(sorted(known))}.")
    rows = {len(each) for each in chosen.values()}
    if len(rows) != 1:
        raise ValueError("its arrays have different numbers of rows")
    columns = Columns(rows.pop())
    for name, array in chosen.items():
        _add_array(columns, name, array)
    return columns


def _add_array(columns: Columns, name: str, array: np.ndarray[Any, Any]) -> None:
    if name == PREDICTION and array.dtype.kind in "iuSUb":
        columns.values[name] = [str(each) for each in array.reshape(-1).tolist()]
    elif array.dtype.kind in "SUO":
        raw = pack_strings([str(each) for each in array.reshape(-1).tolist()])
        add_tensor(columns, SampledTensor(name, "BYTES", array.shape[1:], raw))
    else:
        code = array.dtype.newbyteorder("<").str
        datatype = next((each.name for each in DATATYPES.values() if each.numpy in (code, code[1:])), None)
        values = array if datatype else array.astype("<f8")
        add_tensor(columns, SampledTensor(name, datatype or "FP64", array.shape[1:], values.tobytes()))


def named(cells: Mapping[str, Sequence[Any]], rows: int, signature: Doc | None) -> Columns:
    """Return the columns of a file that belong to a version's inputs and outputs.

    ``cells``: the cells of each column, by the column's name in the file. If no name is the name of an
    input's column, the order decides which column belongs to which input. In this case, raise UsageError if
    the file has more or fewer columns than the inputs.
    """
    expected = input_columns(signature)
    chosen = {name: each for name, each in cells.items() if not expected or name in (*expected, *_OUTPUTS)}
    if expected and not set(chosen) & set(expected):
        if len(cells) != len(expected):
            raise UsageError(
                f"The file has the columns {_some(list(cells))}. Expected those of the version's inputs: "
                f"{_some(expected)}. Without these names, the file needs "
                f"the same number of columns in that order ({len(expected)})."
            )
        chosen = dict(zip(expected, cells.values(), strict=True))
    columns = Columns(rows)
    for name, each in chosen.items():
        _add_cells(columns, name, each)
    return columns


def _add_cells(columns: Columns, name: str, cells: Sequence[Any]) -> None:
    try:
        if name == PREDICTION and all(isinstance(each, str) and each.isdecimal() for each in cells):
            raise ValueError  # A class is a name, even if it looks like a number. Treat it as a text.
        numbers = [float("nan") if each in (None, "") else float(each) for each in cells]
    except (TypeError, ValueError):
        texts = [None if each is None else str(each) for each in cells]
        if name not in _OUTPUTS:
            columns.put(f"{name}.length", np.array([len((each or "").encode()) for each in texts], float))
        if all(len((each or "").encode()) <= VALUE_BYTES for each in texts):
            columns.values[name] = texts
        return
    columns.put(name, np.asarray(numbers))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
