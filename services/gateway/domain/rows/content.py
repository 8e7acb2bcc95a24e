"""Decode bodies by their content type, and encode answers by the type that the caller accepts.

The types are those of SageMaker's containers: JSON, JSON Lines, CSV, NumPy's format, and raw bytes.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import orjson

from services.gateway.domain.contract import Contract, Decoded, Inputs
from services.gateway.domain.rows import decoding, encoding
from tidegate.kernel.errors import BadRequest, PayloadTooLarge
from tidegate.kernel.protocol import bounded_json
from tidegate.kernel.protocol.envelope import Buffer
from tidegate.kernel.protocol.tensors import check_count

JSON, CSV, NPY, LINES = "application/json", "text/csv", "application/x-npy", "application/jsonlines"
_LINES = frozenset({LINES, "application/x-jsonlines", "application/jsonl", "application/x-ndjson"})
# `curl -d` sends this type by default. No supported protocol accepts forms, so such a body is read as JSON.
_CURL = "application/x-www-form-urlencoded"
_NUMBERS = {"FP16", "FP32", "FP64"}
# The largest numbers of cells and lines in a request, and of cells in an answer. The limits are checked
# before the body is decoded or the answer is encoded, because this work blocks the event loop.
_MOST_CELLS, _MOST_LINES = 2**22, 2**19
_MOST_WRITTEN_CELLS = 2**20
# The largest size of a NumPy array of strings, in bytes. Each string takes as much memory as the longest one,
# so one long string can make an array very large.
_MOST_TEXT_BYTES = 64 * 2**20
# NumPy's codes for the accepted kinds of arrays: booleans, integers, floating-point and complex numbers, and
# strings.
_KINDS = "biufcSU"
# The member of MLflow's requests that has a list of column names and a list of rows.
SPLIT = "dataframe_split"
_ROWS = ("instances", "features", "data", "dataframe_records")


def decode(content_type: str, body: Buffer, contract: Contract) -> Decoded:
    """Decode a request body. An empty ``content_type`` means JSON.

    Raise BadRequest for a wrong body, and PayloadTooLarge for one that is too large. Raise Unavailable if the
    model's signature is not known.
    """
    decoding.known(contract)
    kind = content_type.partition(";")[0].strip().lower()
    if is_json(kind):
        return from_json(bounded_json.loads(body), contract)
    if kind in _LINES:
        bounded_json.check(body)  # check all lines together, because many small lines can exceed the limit
        _check_lines(raw := bytes(body))
        lines = [line for line in raw.splitlines() if line.strip()]
        return decoding.from_rows([_row(bounded_json.loads(line)) for line in lines], contract)
    if kind == CSV:
        return _from_csv(body, contract)
    if kind in (NPY, "application/x-numpy"):
        return _from_npy(body, contract)
    if kind.startswith(("image/", "audio/", "video/")) or kind in ("application/octet-stream", "text/plain"):
        return _from_bytes(body, contract)
    known = ", ".join((JSON, LINES, CSV, NPY, "image/*", "application/octet-stream"))
    raise BadRequest(f"content type {kind[:80]!r} is not supported; expected one of {known}")


def is_json(content_type: str) -> bool:
    """Return True if a body of this type is read as JSON.

    This holds for JSON, types with ``+json``, an empty type, and the type that curl sends by default.
    """
    kind = content_type.partition(";")[0].strip().lower()
    return kind in ("", JSON, _CURL) or kind.endswith("+json")


def from_json(document: Any, contract: Contract) -> Decoded:
    """Decode the request in a JSON document.

    The document is one of these:
    - a list of rows;
    - an object with the rows in a member such as ``instances``;
    - an object with a table in MLflow's form;
    - an object with columns in ``inputs``;
    - one row: an object of the inputs by name.
    """
    decoding.known(contract)
    if isinstance(document, list):
        return decoding.from_rows(document, contract)
    if not isinstance(document, dict):
        raise BadRequest("the request must be a JSON object or a list of rows")
    for name in _ROWS:
        if name in document and name not in contract.inputs:
            return decoding.from_rows(document[name], contract)
    if SPLIT in document and SPLIT not in contract.inputs:
        return decoding.from_rows(_split(document[SPLIT], contract), contract)
    if is_columns(document, contract):
        return decoding.from_columns(document["inputs"], contract)
    if document.keys() & contract.inputs.keys():
        return decoding.from_rows([document], contract)
    raise BadRequest(
        "the request has neither 'instances' (rows) nor 'inputs' (columns); "
        f"the model takes {list(contract.inputs)}"
    )


def _split(table: Any, contract: Contract) -> list[Any]:
    """Return the rows of a table in MLflow's form, which has ``columns`` (names) and ``data`` (rows)."""
    columns, rows = (
        (table.get(key) for key in ("columns", "data")) if isinstance(table, dict) else (None, None)
    )
    if not isinstance(columns, list) or not isinstance(rows, list):
        raise BadRequest(f"{SPLIT} must be an object with the lists 'columns' and 'data'")
    if any(not isinstance(row, list) or len(row) != len(columns) for row in rows):
        raise BadRequest(f"each row of {SPLIT} must be a list of {len(columns)} values, one for each column")
    if not set(map(str, columns)) & contract.inputs.keys():
        return rows  # the columns are not inputs, so the rows are values of the only input
    return [dict(zip(columns, row, strict=True)) for row in rows]


def encode(accept: str, found: dict[str, np.ndarray], *, rows: bool) -> tuple[str, bytes]:
    """Return the content type and the body of an answer. ``rows``: True if the request had rows.

    If the caller accepts none of the types that this module can write, the answer is JSON, as in SageMaker's
    containers.
    """
    kinds = [each.partition(";")[0].strip().lower() for each in accept.split(",")]
    kind = next((each for each in kinds if each in (JSON, CSV, NPY) or each in _LINES), JSON)
    if kind == CSV:
        if (size := sum(each.size for each in found.values())) > _MOST_WRITTEN_CELLS:
            raise BadRequest(
                f"the answer has {size} cells, but an answer as CSV may have at most {_MOST_WRITTEN_CELLS}. "
                f"Send the header Accept: {NPY}"
            )
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(cells(found))
        return CSV, text.getvalue().encode()
    if kind == NPY:
        if len(found) != 1:
            raise BadRequest(
                f"{NPY} can hold only one output, but the model returns {list(found)}. Send the header "
                f"Accept: {JSON}"
            )
        raw = io.BytesIO()
        (array,) = found.values()
        np.save(raw, _texts(array) if array.dtype == object else array, allow_pickle=False)
        return NPY, raw.getvalue()
    if kind in _LINES:
        encoding.check_rows(found)
        return kind, b"".join(orjson.dumps(row) + b"\n" for row in encoding.as_rows(found))
    body = {"predictions": encoding.as_rows(found)} if rows else {"outputs": encoding.columns(found)}
    return JSON, orjson.dumps(body)


def _texts(array: np.ndarray) -> np.ndarray:
    sizes = (len(each) if isinstance(each, str) else _MOST_TEXT_BYTES for each in array.flat)
    longest = max(sizes, default=0)
    if 4 * longest * array.size > _MOST_TEXT_BYTES:
        raise BadRequest(
            f"the strings of the answer are not UTF-8, or are too long for {NPY}. Send the header "
            f"Accept: {JSON}"
        )
    return array.astype(str)


def cells(found: dict[str, np.ndarray]) -> list[list[Any]]:
    """Return the outputs as lines of a table. Each line has one row's values of all outputs."""
    lines: list[list[Any]] = []
    for row in encoding.as_rows(found):
        values = row.values() if isinstance(row, dict) and row.keys() == found.keys() else [row]
        lines.append([cell for value in values for cell in _flat(value)])
    return lines


def _flat(value: Any) -> list[Any]:
    if not isinstance(value, list):
        return [value]
    return [cell for each in value for cell in _flat(each)]


def is_columns(document: Any, contract: Contract) -> bool:
    """Return True if a JSON document has columns (in its member ``inputs``) and no rows."""
    return (
        isinstance(document, dict)
        and "inputs" in document
        and "inputs" not in contract.inputs
        and not any(name in document and name not in contract.inputs for name in _ROWS)
    )


def _row(value: Any) -> Any:
    """Return the row that a JSON line contains.

    In requests for SageMaker's own algorithms, a line is an object with the row in ``features``.
    """
    return value["features"] if isinstance(value, dict) and value.keys() == {"features"} else value


def _check_lines(raw: bytes) -> None:
    if max(raw.count(b"\n"), raw.count(b"\r")) > _MOST_LINES:
        raise PayloadTooLarge(f"the body has more than {_MOST_LINES} lines: send fewer lines, or send {NPY}")


def _from_csv(body: Buffer, contract: Contract) -> Decoded:
    _check_lines(raw := bytes(body))
    if raw.count(b",") + raw.count(b"\n") > _MOST_CELLS:
        raise PayloadTooLarge(f"the CSV has more than {_MOST_CELLS} cells: send {NPY}")
    try:
        lines = [line for line in csv.reader(io.StringIO(raw.decode())) if line]
    except (UnicodeDecodeError, csv.Error) as problem:
        raise BadRequest(f"the body is not CSV: {problem}") from None
    if not lines:
        raise BadRequest("the CSV has no lines")
    width, names = len(lines[0]), list(contract.inputs)
    if len(names) == 1 or width != len(names):
        values: Any = [_values(line, names[0], contract) for line in lines]
        if width == 1 and not contract.inputs[names[0]][1].dims:
            values = [line[0] for line in values]
        return decoding.from_rows(values, contract)
    if any(len(line) != width for line in lines):
        raise BadRequest(f"every line of the CSV must have {width} cells, for the inputs {names}")
    table = [_values([line[at] for line in lines], name, contract) for at, name in enumerate(names)]
    return decoding.from_columns(dict(zip(names, table, strict=True)), contract)


def _values(texts: list[str], name: str, contract: Contract) -> list[Any]:
    """Return the numbers in cells; for an input of strings, return the cells unchanged."""
    kind = contract.inputs[name][1].datatype.name
    if kind == "BYTES":
        return list[Any](texts)
    number: Callable[[str], float] = float if kind in _NUMBERS else int
    try:
        return list(map(number, texts))
    except ValueError:
        wrong = next(each for each in texts if not _is(number, each))
        raise BadRequest(f"input {name!r}: the cell {wrong[:40]!r} is not {kind}") from None


def _is(number: Callable[[str], float], text: str) -> bool:
    try:
        number(text)
    except ValueError:
        return False
    return True


def _from_npy(body: Buffer, contract: Contract) -> Decoded:
    array = _array(body)
    name = decoding.only(contract)
    datatype = contract.inputs[name][1].datatype
    if datatype.name == "BYTES":
        check_count(name, array.size)
        try:
            texts = array.tolist() if array.dtype.kind in "SU" else array.astype(str).tolist()
        except (ValueError, SystemError) as problem:  # the array has invalid code points
            raise BadRequest(f"input {name!r}: the array is not text: {problem}") from None
        return decoding.from_columns(texts, contract)
    if datatype.name == "BF16" or not np.can_cast(array.dtype, datatype.numpy, "same_kind"):
        raise BadRequest(f"input {name!r}: expected {datatype.name}, got an array of {array.dtype}")
    inputs = Inputs(contract)
    inputs.expect(name, datatype.name, list(array.shape))
    inputs.put(np.ascontiguousarray(array, dtype=datatype.numpy).tobytes())
    tensors, data, rows = inputs.done()
    return Decoded("", rows, contract.key(tensors, (), {}), data, None, False, None, 0)


def _array(body: Buffer) -> np.ndarray:
    """Return the array in a .npy body.

    ``np.load`` is not used: it allocates the size that the header declares, even if the body is small.
    """
    file = io.BytesIO(body)
    try:
        version = np.lib.format.read_magic(file)
        one, two = np.lib.format.read_array_header_1_0, np.lib.format.read_array_header_2_0
        read = one if version == (1, 0) else two
        shape, fortran, dtype = read(file)
    except Exception as problem:  # NumPy raises many kinds of errors for a bad header of the file
        raise BadRequest(f"the body is not an array in NumPy's format (.npy): {problem}") from None
    if dtype.hasobject:
        raise BadRequest("the array holds Python objects, which are not loaded: send numbers or strings")
    if dtype.kind not in _KINDS or not dtype.itemsize or any(size < 0 for size in shape):
        raise BadRequest(f"the array has the type {dtype} and the shape {shape}: send numbers or strings")
    size, left = math.prod(shape) * dtype.itemsize, len(body) - file.tell()
    if size != left:
        raise BadRequest(f"the header of the array declares {size} bytes, but {left} bytes follow")
    try:
        flat = np.frombuffer(body, dtype, math.prod(shape), file.tell())
        return flat.reshape(shape, order="F" if fortran else "C")
    except ValueError as problem:
        raise BadRequest(f"the array cannot be read: {problem}") from None


def _from_bytes(body: Buffer, contract: Contract) -> Decoded:
    names = [name for name, (_, tensor) in contract.inputs.items() if tensor.datatype.name == "BYTES"]
    if len(names) != 1 or contract.required - set(names):
        raise BadRequest(
            "only a model with one input of strings accepts raw bytes, but this model takes "
            f"{list(contract.inputs)}: send {JSON}"
        )
    tensor = contract.inputs[names[0]][1]
    value: Any = bytes(body)
    for _ in range(len(tensor.dims) + (contract.max_batch > 0)):
        value = [value]
    return decoding.from_columns({names[0]: value}, contract)
