"""Read the annotations of a model's Python file as tensors, from the syntax tree. Nothing is executed."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, cast

from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.models import Datatype
from tidegate.model import DATATYPES

Kind = Literal["array", "list", "scalar"]

# The maximum number of aliases or nested types to follow. Two aliases can refer to each other in a loop.
DEEPEST = 20
# The most characters of an annotation that an error message shows.
LONGEST = 200

_SCALARS: dict[str, Datatype] = {
    "float": "FP64", "int": "INT64", "bool": "BOOL", "str": "BYTES", "bytes": "BYTES",
}  # fmt: skip
_NUMPY: dict[str, Datatype] = {
    "float16": "FP16", "half": "FP16", "float32": "FP32", "single": "FP32", "float64": "FP64",
    "double": "FP64", "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64",
    "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64", "bool_": "BOOL",
    "str_": "BYTES", "bytes_": "BYTES", "object_": "BYTES",
}  # fmt: skip
_TEXT = {"str", "str_"}
_LISTS = {"list", "List", "Sequence"}


@dataclass(frozen=True, slots=True)
class Described:
    """A tensor as its annotation describes it.

    ``shape`` has all axes, also the batch axis. ``kind`` is the type that ``predict`` gets: a numpy array, a
    (nested) list, or a single Python value (shape [1]). ``text``: True if the elements are str, not bytes.
    """

    datatype: Datatype
    shape: tuple[int, ...]
    kind: Kind = "array"
    text: bool = False


class Unclear(Exception):
    """An error: an annotation does not describe a tensor. The message says why."""


@dataclass(frozen=True, slots=True)
class Scope:
    """The names that a file defines at its top level, by assignments and classes."""

    values: Mapping[str, ast.expr]
    classes: Mapping[str, ast.ClassDef]


def described(annotation: ast.expr | None, scope: Scope, depth: int = 0) -> Described:
    """Return the tensor that an annotation describes.

    Raises Unclear if the annotation is incomplete, and BadRequest for an invalid ``Tensor``.
    """
    if annotation is None:
        raise Unclear("has no annotation")
    node = resolved(annotation, scope)
    if depth > DEEPEST:
        raise Unclear("has an annotation that is nested too deeply")
    name = last_name(node)
    if name in _SCALARS:
        return Described(_SCALARS[name], (1,), "scalar", name in _TEXT)
    if isinstance(node, ast.Subscript):
        return _subscript(node, scope, depth)
    raise Unclear(f"is annotated {written(annotation)!r}, which says neither a datatype nor a shape")


def resolved(node: ast.expr, scope: Scope) -> ast.expr:
    """Return the expression that an annotation means. Raise Unclear if it means several types.

    A name is replaced by the value that the file assigns to it. Quotes are removed. ``None`` is removed from
    a union.
    """
    for _ in range(DEEPEST):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node = _parsed(node.value)
        elif isinstance(node, ast.Name) and node.id in scope.values:
            node = scope.values[node.id]
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            node = node.left if _is_none(node.right) else node.right if _is_none(node.left) else node
            if isinstance(node, ast.BinOp):
                raise Unclear(f"is annotated with a union, {written(node)!r}")
        elif isinstance(node, ast.Subscript) and last_name(node.value) == "Optional":
            node = node.slice
        else:
            return node
    raise Unclear("has an annotation that refers to itself")


def arguments(node: ast.Subscript) -> list[ast.expr]:
    """Return the expressions between the brackets of a subscript."""
    return list(node.slice.elts) if isinstance(node.slice, ast.Tuple) else [node.slice]


def written(node: ast.expr) -> str:
    """Return an expression as Python code for a message, cut off after ``LONGEST`` characters.

    Return ``...`` if Python cannot write the expression.
    """
    try:
        return ast.unparse(node)[:LONGEST]
    except (RecursionError, ValueError):  # it is nested too deeply, or an integer has too many digits
        return "..."


def last_name(node: ast.expr) -> str:
    """Return ``float32`` for ``np.float32``, or an empty string if the expression is not a name."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _subscript(node: ast.Subscript, scope: Scope, depth: int) -> Described:
    name, parts = last_name(node.value), arguments(node)
    if name == "Tensor":
        return _tensor(parts, scope)
    if name == "Annotated":
        for each in parts[1:]:
            if isinstance(each, ast.Call) and last_name(each.func) == "Tensor":
                return _tensor(each.args, scope)
        return described(parts[0], scope, depth + 1)
    if name in _LISTS and len(parts) == 1:
        inner = described(parts[0], scope, depth + 1)
        if inner.kind == "array":
            raise Unclear(f"is annotated {written(node)!r}, a list of arrays")
        shape = (-1,) if inner.kind == "scalar" else (-1, *inner.shape)
        return replace(inner, shape=shape, kind="list")
    if name == "ndarray" and len(parts) == 2:
        return _ndarray(node, parts, scope)
    if name == "NDArray":
        raise Unclear(f"is annotated {written(node)!r}, which says a datatype but not a shape")
    raise Unclear(f"is annotated {written(node)!r}, which Tidegate cannot read")


def _tensor(parts: list[ast.expr], scope: Scope) -> Described:
    """Return the tensor that ``Tensor["FP32", -1, 4]`` describes. Raise BadRequest for a mistake.

    A mistake is an error even if the user passes a signature. A missing annotation is then no error.
    """
    given = f"Tensor[{', '.join(map(written, parts[:LONGEST]))[:LONGEST]}]"
    datatype, text = _datatype(parts[0] if parts else None, scope)
    if datatype is None:
        raise BadRequest(
            f"{given} does not begin with a datatype: one of {', '.join(DATATYPES)}, or a type such as "
            "np.float32, str or bytes."
        )
    shape = [_size(part, scope) for part in parts[1:]]
    if None in shape or not shape:
        raise BadRequest(
            f"{given} has no shape: write a whole number for each axis, -1 for any size, as in "
            'Tensor["FP32", -1, 4].'
        )
    return Described(datatype, tuple(cast("list[int]", shape)), "array", text)


def _datatype(node: ast.expr | None, scope: Scope) -> tuple[Datatype | None, bool]:
    """Return the datatype of ``"FP32"``, ``np.float32`` or ``str``, and True if its values are text."""
    if isinstance(node, ast.Name) and node.id in scope.values:
        node = scope.values[node.id]
    if isinstance(node, ast.Constant):
        return (cast("Datatype", node.value), False) if node.value in DATATYPES else (None, False)
    name = "" if node is None else last_name(node)
    return _NUMPY.get(name) or _SCALARS.get(name), name in _TEXT


def _ndarray(node: ast.Subscript, parts: list[ast.expr], scope: Scope) -> Described:
    """Read an annotation such as ``np.ndarray[tuple[int, Literal[4]], np.dtype[np.float32]]``."""
    shape, dtype = (resolved(part, scope) for part in parts)
    if not (isinstance(shape, ast.Subscript) and last_name(shape.value) in {"tuple", "Tuple"}):
        raise Unclear(f"is annotated {written(node)!r}, which says a datatype but not a shape")
    if not isinstance(dtype, ast.Subscript):
        raise Unclear(f"is annotated {written(node)!r}, which says a shape but not a datatype")
    datatype, text = _datatype(arguments(dtype)[0], scope)
    sizes = [_axis(part, scope) for part in arguments(shape)]
    if datatype is None or None in sizes:
        raise Unclear(
            f"is annotated {written(node)!r}, which does not say the datatype and the size of each axis"
        )
    return Described(datatype, tuple(cast("list[int]", sizes)), "array", text)


def _axis(node: ast.expr, scope: Scope) -> int | None:
    if last_name(node) == "int":
        return -1
    if isinstance(node, ast.Subscript) and last_name(node.value) == "Literal":
        return _size(node.slice, scope)
    return None


def _size(node: ast.expr, scope: Scope) -> int | None:
    """Return the size of an axis: a number, or the number that the file assigns to a name; None: invalid."""
    if isinstance(node, ast.Name) and node.id in scope.values:
        node = scope.values[node.id]
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None
    return value if type(value) is int and -1 <= value < 2**63 else None


def _parsed(text: str) -> ast.expr:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise Unclear(f"is annotated {text[:80]!r}, which is not valid Python") from None


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None
