"""Read the signature of a torch.export program, and decide if loading its file can run code. Pure."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.models import Datatype, Signature, TensorSpec

# The datatypes by their numbers in torch._export.serde.schema.ScalarType.
_TYPES: dict[int, Datatype] = {
    1: "UINT8", 2: "INT8", 3: "INT16", 4: "INT32", 5: "INT64", 6: "FP16", 7: "FP32", 8: "FP64",
    12: "BOOL", 13: "BF16", 28: "UINT16", 34: "UINT32", 35: "UINT64",
}  # fmt: skip
# torch evaluates the size of a dynamic axis as a Python expression. Only these names may be called in it.
_CALLS = frozenset({
    "Symbol", "Integer", "Rational", "Float", "Add", "Mul", "Pow", "Max", "Min", "Mod", "PythonMod",
    "FloorDiv", "CleanDiv", "IntTrueDiv", "FloatTrueDiv", "CeilToInt", "FloorToInt", "ModularIndexing",
})  # fmt: skip
_AXIS = re.compile(r"[su]\d+")
_CALM = (
    ast.Expression, ast.Constant, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.operator, ast.unaryop,
    ast.boolop, ast.cmpop, ast.Load, ast.keyword, ast.Subscript,
)  # fmt: skip
_LONGEST = 4096
_EXAMPLE = "torch.export.save(torch.export.export(model.eval(), (example,), dynamic_shapes=...), 'model.pt2')"
# The names that torch writes into the pickle of example inputs.
_PICKLED = re.compile(r"torch\._utils _rebuild_tensor_v2|torch \w+Storage|collections OrderedDict")


def signature_of(program: Mapping[str, Any], given: Signature | None, default_max_batch: int) -> Signature:
    """Return the signature ``given``, or derive one from the program if ``given`` is None.

    If all inputs and outputs have the same dynamic first axis, it is the batch axis. Raise BadRequest if
    ``given`` does not fit the program, or if the program cannot be read or served.
    """
    try:
        graph = program["graph_module"]
        inputs = _named(graph, "input_specs", "user_input", _input_names(graph))
        outputs = _named(graph, "output_specs", "user_output", _output_names(graph))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as problem:
        raise BadRequest(
            f"The signature of the exported program cannot be read ({str(problem)[:120]}). Inputs and "
            f"outputs must be plain tensors: not nested, and not keyword arguments. {_EXAMPLE}"
        ) from None
    if given is not None:
        _check_fits(given, inputs, outputs)
        return given
    firsts = {sizes[0] if sizes else None for _, _, sizes in (*inputs, *outputs)}
    rows = len(firsts) == 1 and isinstance(next(iter(firsts)), str)
    try:
        return Signature(
            inputs=[_spec(each, rows=rows) for each in inputs],
            outputs=[_spec(each, rows=rows) for each in outputs],
            max_batch_size=default_max_batch if rows else 0,
        )
    except ValidationError as error:
        raise BadRequest(f"The exported program cannot be served: {error.errors()[0]['msg']}.") from None


def runs_code(program: Mapping[str, Any], payloads: Mapping[str, str], names: Mapping[str, set[str]]) -> str:
    """Return why loading the file could run code; empty if it cannot.

    ``payloads``: the JSON texts of the files that describe weights or constants, by file name. ``names``: the
    imports of each pickle in the file, by the pickle's name.
    """
    for file, text in payloads.items():
        try:
            entries = list(json.loads(text)["config"].values())
            odd = any(each["use_pickle"] or "obj" in str(each["path_name"]) for each in entries)
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"{file} cannot be read"
        if odd:
            return f"{file} names pickled values"
    for file, found in names.items():
        if unknown := sorted(each for each in found if not _PICKLED.fullmatch(each)):
            return f"{file} is a pickle that imports {unknown[0][:80]}"
    for text in _expressions(program):
        if not _is_calm(text):
            return f"a shape has the expression {text[:80]!r}"
    return ""


Tensor = tuple[str, Datatype, list[int | str]]
"""A tensor's name, datatype and sizes. The size of an open axis is its expression."""


def _named(graph: Mapping[str, Any], specs: str, kind: str, names: list[str] | None) -> list[Tensor]:
    found = []
    for spec in graph["signature"][specs]:
        if kind not in spec:
            continue
        name = spec[kind]["arg"]["as_tensor"]["name"]
        value = graph["graph"]["tensor_values"][name]
        if (datatype := _TYPES.get(value["dtype"])) is None:
            raise ValueError(f"the inference protocol has no datatype for {name!r}")
        sizes = [
            size["as_int"] if "as_int" in size else size["as_expr"]["expr_str"] for size in value["sizes"]
        ]
        found.append((name, datatype, sizes))
    if names is None:
        return found
    if len(names) != len(found):
        raise ValueError(f"the program has {len(found)} tensors, but the signature has {len(names)} names")
    return [(name, datatype, sizes) for name, (_, datatype, sizes) in zip(names, found, strict=True)]


def _size(size: Mapping[str, Any]) -> int | str:
    return int(size["as_int"]) if "as_int" in size else str(size["as_expr"]["expr_str"])


def _input_names(graph: Mapping[str, Any]) -> list[str]:
    signature = graph["module_call_graph"][0]["signature"]
    positional, keywords = json.loads(signature["in_spec"])[1]["children_spec"]
    if keywords["children_spec"] or any(each["type"] is not None for each in positional["children_spec"]):
        raise ValueError("the program takes keyword arguments or nested arguments")
    return [str(name) for name in signature["forward_arg_names"]]


def _output_names(graph: Mapping[str, Any]) -> list[str]:
    spec = json.loads(graph["module_call_graph"][0]["signature"]["out_spec"])[1]
    children = spec["children_spec"]
    if any(each["type"] is not None for each in children):
        raise ValueError("the program returns nested values")
    if spec["type"] is None:
        return ["output"]
    if spec["type"] == "builtins.dict":
        return [str(name) for name in json.loads(spec["context"])]
    return ["output"] if len(children) == 1 else [f"output_{number}" for number in range(len(children))]


def _spec(tensor: Tensor, *, rows: bool) -> TensorSpec:
    name, datatype, sizes = tensor
    shape = [size if isinstance(size, int) else -1 for size in sizes]
    return TensorSpec(name=name, datatype=datatype, shape=shape[1:] if rows else shape)


def _check_fits(given: Signature, inputs: list[Tensor], outputs: list[Tensor]) -> None:
    for role, tensors, own in (("inputs", given.inputs, inputs), ("outputs", given.outputs, outputs)):
        wanted = [datatype for _, datatype, _ in own]
        if [tensor.datatype for tensor in tensors] != wanted:
            raise BadRequest(
                f"The signature's {role} do not fit the exported program, which has {len(own)} {role} of "
                f"the types {', '.join(wanted)}. Correct the signature, or leave --signature out."
            )


def _expressions(value: Any) -> Iterator[str]:
    """Yield the Python expressions in a program. torch evaluates them when it loads the program."""
    left = [value]
    while left:
        each = left.pop()
        if isinstance(each, list):
            left.extend(each)
        elif isinstance(each, dict):
            for key, inner in each.items():
                if key == "guards_code":
                    yield from (str(text) for text in inner or ())
                elif key == "expr_str":
                    yield str(inner)
                else:
                    left.append(inner)


def _is_calm(text: str) -> bool:
    """Return True if an expression is safe: it only computes with the sizes of axes."""
    if len(text) > _LONGEST:
        return False
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    called = {id(each.func) for each in ast.walk(tree) if isinstance(each, ast.Call)}
    return all(_is_calm_node(each, id(each) in called) for each in ast.walk(tree))


def _is_calm_node(node: ast.AST, called: bool) -> bool:
    if isinstance(node, ast.Attribute):  # a guard, such as L['x'].size()[0] == 4
        return node.attr == "size" and called
    if isinstance(node, ast.Name):
        return node.id in _CALLS if called else node.id == "L" or _AXIS.fullmatch(node.id) is not None
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name | ast.Attribute)
    return isinstance(node, _CALM)
