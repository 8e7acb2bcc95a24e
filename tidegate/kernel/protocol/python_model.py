"""Read the inputs and outputs of a Python file with ``predict`` from its syntax tree. Nothing is executed.

The file has a function ``predict``, or one class with a method ``predict`` and perhaps a method ``load``. Its
signature comes from the annotations (:mod:`tidegate.kernel.protocol.python_annotations`), or from the user.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field

from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.backend_class import BACKEND_CLASS
from tidegate.kernel.protocol.python_annotations import (
    Described,
    Scope,
    Unclear,
    arguments,
    described,
    last_name,
    resolved,
    written,
)
from tidegate.model import DEFAULT_MAX_SIZE

PREDICT, LOAD = "predict", "load"
FACTS = ("device", "folder", "threads")
"""The arguments that ``load`` may take: the model's device ("cpu", "cuda:0"), its folder, its CPU threads."""

_STREAMS = {"Iterator", "Iterable", "Generator", "AsyncIterator", "AsyncIterable", "AsyncGenerator"}
_MAX_ROWS = 1_000_000
NEITHER = (
    "A Python model needs one of these at the top of its file: a function `predict`, a class with a method "
    f"`predict`, or a class {BACKEND_CLASS} with a method execute(self, requests) (Triton's Python backend)."
)

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Value:
    """An input or output. If ``found`` is None, ``why`` says what its annotation lacks."""

    name: str
    found: Described | None
    why: str = ""
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Source:
    """The facts about a file with ``predict``.

    ``entry``: the name of the class with the method ``predict``; None: ``predict`` is a function.
    ``takes_any``: True if ``predict`` has a parameter ``**kwargs``.
    ``outputs``, ``why``: the outputs that the return annotation describes. If there are none, ``why``
      says what this annotation lacks.
    ``max_size``: the maximum number of rows in a call; 0: each call has exactly one request.
    ``load``: the names of the arguments of the method ``load``; None: there is no such method.
    """

    entry: str | None
    inputs: list[Value]
    takes_any: bool
    outputs: list[Value] = field(default_factory=list)
    why: str = ""
    max_size: int = 0
    streams: bool = False
    asynchronous: bool = False
    load: list[str] | None = None


def parsed(source: str | bytes, filename: str = "model.py") -> ast.Module:
    """Return the syntax tree of a model's file. Raises BadRequest if it is not valid Python."""
    try:
        return ast.parse(source, filename=filename)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise BadRequest(f"The file is not valid Python: {error}.") from None


def read(tree: ast.Module) -> Source:
    """Return the inputs and outputs of a file without ``TritonPythonModel``.

    Raises BadRequest if ``predict`` is missing, ambiguous, or cannot be called.
    """
    scope = _scope(tree)
    entry, predict = _entry(tree)
    if entry is not None:
        _check_constructor(scope.classes[entry])
    streams = _yields(predict)
    max_size = _max_size(predict, scope)
    if streams and max_size:
        raise BadRequest(
            "predict is @batched and contains `yield`: a stream answers only one request. Remove @batched "
            "or `yield`."
        )
    inputs, takes_any = _inputs(predict, entry is not None, scope)
    outputs, why = _outputs(predict, scope, streams=streams)
    return Source(
        entry=entry,
        inputs=inputs,
        takes_any=takes_any,
        outputs=outputs,
        why=why,
        max_size=max_size,
        streams=streams,
        asynchronous=isinstance(predict, ast.AsyncFunctionDef),
        load=None if entry is None else _load(scope.classes[entry]),
    )


def _scope(tree: ast.Module) -> Scope:
    values: dict[str, ast.expr] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            values[node.targets[0].id] = node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            values[node.target.id] = node.value
    return Scope(values, {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)})


def _method(node: ast.Module | ast.ClassDef, name: str) -> Function | None:
    found = [each for each in node.body if isinstance(each, Function) and each.name == name]
    return found[-1] if found else None  # Python uses the last definition


def _entry(tree: ast.Module) -> tuple[str | None, Function]:
    if (function := _method(tree, PREDICT)) is not None:
        return None, function
    classes = {
        node.name: method
        for node in tree.body
        if isinstance(node, ast.ClassDef) and (method := _method(node, PREDICT)) is not None
    }
    if not classes:
        raise BadRequest(NEITHER)
    if len(classes) > 1 and "Model" not in classes:
        raise BadRequest(
            f"The classes {', '.join(classes)} all have a method `predict`. Give the name `Model` to "
            "the class to serve."
        )
    name = next(iter(classes)) if len(classes) == 1 else "Model"
    return name, classes[name]


def _check_constructor(node: ast.ClassDef) -> None:
    constructor = _method(node, "__init__")
    if constructor is not None and (wanted := _required(constructor)):
        raise BadRequest(
            f"Tidegate calls {node.name}() without arguments, but __init__ needs {', '.join(wanted)}: give "
            f"them defaults, or move the work to `def load(self)`, which may take {', '.join(FACTS)}."
        )


def _required(method: Function) -> list[str]:
    """Return the arguments of a method that have no default, except ``self``."""
    found = method.args
    places = [*found.posonlyargs, *found.args]
    plain = places[1 : len(places) - len(found.defaults)]
    keywords = [a for a, default in zip(found.kwonlyargs, found.kw_defaults, strict=True) if default is None]
    return [each.arg for each in (*plain, *keywords)]


def _load(node: ast.ClassDef) -> list[str] | None:
    method = _method(node, LOAD)
    if method is None:
        return None
    if unknown := [name for name in _required(method) if name not in FACTS]:
        raise BadRequest(
            f"{node.name}.load needs {', '.join(unknown)}, which Tidegate does not know. It passes "
            f"{', '.join(FACTS)} by name; for anything else use an environment variable (--env K=V)."
        )
    named = [each.arg for each in (*method.args.args[1:], *method.args.kwonlyargs)]
    return [name for name in named if name in FACTS]


def _max_size(predict: Function, scope: Scope) -> int:
    for node in predict.decorator_list:
        call = node if isinstance(node, ast.Call) else None
        if last_name(call.func if call else node) != "batched":
            continue
        given = next((k.value for k in call.keywords if k.arg == "max_size"), None) if call else None
        if given is None:
            return DEFAULT_MAX_SIZE
        if isinstance(given, ast.Name):
            given = scope.values.get(given.id, given)
        size = given.value if isinstance(given, ast.Constant) else None
        if type(size) is int and 1 <= size <= _MAX_ROWS:
            return size
        raise BadRequest(
            f"@batched(max_size={written(given)}) is not a number that can be read from the file: write "
            f"one from 1 to {_MAX_ROWS}, as in @batched(max_size={DEFAULT_MAX_SIZE})."
        )
    return 0


def _inputs(predict: Function, is_method: bool, scope: Scope) -> tuple[list[Value], bool]:
    args = predict.args
    static = any(last_name(node) == "staticmethod" for node in predict.decorator_list)
    places = [*args.posonlyargs, *args.args][is_method and not static :]
    if args.posonlyargs and args.posonlyargs[-1] in places:
        raise BadRequest("predict is called with arguments by name: remove the `/` from its arguments.")
    first_default = len(places) - len(args.defaults)
    found = [_value(arg, scope, optional=at >= first_default) for at, arg in enumerate(places)]
    found += [
        _value(arg, scope, optional=default is not None)
        for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)
    ]
    return found, args.kwarg is not None


def _value(arg: ast.arg, scope: Scope, *, optional: bool = False) -> Value:
    try:
        return Value(arg.arg, described(arg.annotation, scope), optional=optional)
    except Unclear as problem:
        return Value(arg.arg, None, f"`{arg.arg}` {problem}", optional)


def _outputs(predict: Function, scope: Scope, *, streams: bool) -> tuple[list[Value], str]:
    """Return the outputs that the return annotation of ``predict`` names, and a text.

    The text says what the annotation lacks. It is empty if the annotation lacks nothing.
    """
    try:
        if predict.returns is None:
            raise Unclear("has no annotation")
        node = resolved(predict.returns, scope)
        if streams and isinstance(node, ast.Subscript) and last_name(node.value) in _STREAMS:
            node = resolved(arguments(node)[0], scope)
        return [Value(name, described(each, scope)) for name, each in _named(node, scope)], ""
    except Unclear as problem:
        return [], f"the value that predict {'yields' if streams else 'returns'} {problem}"


def _named(node: ast.expr, scope: Scope) -> list[tuple[str, ast.expr]]:
    """Return the name and the annotation of each output of ``predict``.

    The annotation ``node`` is a dict, a class with fields, or a tuple. Otherwise there is one output, named
    ``output``.
    """
    if isinstance(node, ast.Call) and last_name(node.func) == "TypedDict" and len(node.args) == 2:
        node = node.args[1]
    if isinstance(node, ast.Dict):
        keys = [key.value if isinstance(key, ast.Constant) else None for key in node.keys]
        if all(isinstance(key, str) for key in keys):
            return list(zip(map(str, keys), node.values, strict=True))
    if isinstance(node, ast.Name) and node.id in scope.classes:
        fields = [
            (each.target.id, each.annotation)
            for each in scope.classes[node.id].body
            if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
        ]
        if fields:
            return fields
    if isinstance(node, ast.Subscript) and last_name(node.value) in {"tuple", "Tuple"}:
        return [(f"output_{at}", part) for at, part in enumerate(arguments(node))]
    return [("output", node)]


def _yields(function: Function) -> bool:
    """Return True if the function is a generator. Inner functions and classes are not searched."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Yield | ast.YieldFrom):
            return True
        if not isinstance(node, Function | ast.Lambda | ast.ClassDef):
            waiting += ast.iter_child_nodes(node)
    return False
