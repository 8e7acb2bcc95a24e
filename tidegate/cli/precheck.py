"""Check a deploy before its upload: first on this machine, then at the registry."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

from tidegate.cli import output
from tidegate.cli.api import REGISTER_TIMEOUT_S, Control, Doc, part
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.package import format_of
from tidegate.kernel.errors import NotFound
from tidegate.kernel.protocol import backend_class, names

if TYPE_CHECKING:
    from pathlib import Path

    from tidegate.cli.deploy_request import DeployRequest
    from tidegate.cli.package import Package

_MODEL = "model.py"
_BY_SUFFIX = {".py": "python", ".pt": "torchscript", ".pth": "torchscript", ".ts": "torchscript"}
_LARGEST_SOURCE = 4 * 1024 * 1024
_NO_SIGNATURE = (
    "{path} does not declare its inputs and outputs. Give --signature FILE.json, such as "
    '{{"inputs": [{{"name": "x", "datatype": "FP32", "shape": [4]}}], '
    '"outputs": [{{"name": "y", "datatype": "FP32", "shape": [1]}}], "max_batch_size": 8}}'
)


def check_here(request: DeployRequest) -> None:
    """Raise UsageError for mistakes that can be found without the registry."""
    if (problem := names.problem("model", request.name)) is not None:
        raise UsageError(f"{problem[:-1]}: give another --name.")
    low, high = request.options.get("min_replicas"), request.options.get("max_replicas")
    if low is not None and high is not None and low > high:
        raise UsageError(f"--min {low} is above --max {high}.")
    if not request.path.exists():
        raise UsageError(f"{request.path}: no such file or folder.")
    kind, tree = _read(request.path, request.format)
    for_backend = tree is not None and backend_class.is_for_the_backend(tree)
    described = for_backend and tree is not None and backend_class.may_describe_itself(tree)
    if request.signature is None and not described and (for_backend or kind == "torchscript"):
        raise UsageError(_NO_SIGNATURE.format(path=request.path))
    if tree is not None and not for_backend:
        _check_functions(tree, request.signature)


def _read(path: Path, given: str | None) -> tuple[str, ast.Module | None]:
    """Return a model's format and, for Python, the syntax tree of its file.

    The tree is None for other formats, and if the Python file does not exist. Raise UsageError if the Python
    file cannot be read or parsed.
    """
    if path.is_dir():
        kind, source = given or format_of(path), path / _MODEL
    else:
        kind, source = given or _BY_SUFFIX.get(path.suffix, ""), path
    if kind != "python" or source.suffix != ".py" or not source.is_file():
        return kind, None
    try:
        with source.open("rb") as file:
            return kind, ast.parse(file.read(_LARGEST_SOURCE), filename=source.name)
    except OSError as error:
        raise UsageError(f"{source}: {error.strerror}.") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UsageError(f"{source} is not valid Python: {error}.") from None


def _check_functions(tree: ast.Module, given: Doc | None) -> None:
    """Check the function ``predict`` and the signature ``given``.

    Raise BadRequest if ``given`` does not fit the function. If ``given`` is None, the annotations must state
    the signature: raise BadRequest if they are unclear.
    """
    from pydantic import ValidationError

    from tidegate.kernel.protocol import python_model, python_signature
    from tidegate.kernel.protocol.models import Signature

    try:
        signature = None if given is None else Signature.model_validate(given)
    except ValidationError:
        return  # the registry reports this error
    python_signature.signature_of(python_model.read(tree), signature)


def check_there(control: Control, package: Package, request: DeployRequest, body: Doc) -> list[str]:
    """Let the registry check the version and its Deployment. Return the warnings.

    Raise the error that the registry reports.
    """
    asked = body | {"size": package.size, "deployment": request.options, "endpoint": request.name}
    try:
        found = control.registry.post(f"/v1/models/{part(request.name)}/check", asked, REGISTER_TIMEOUT_S)
    except NotFound:  # a registry of an earlier release has no such route
        return []
    return list(found.get("warnings", ()))


def warn(warnings: list[str]) -> None:
    """Show the registry's warnings, on stderr."""
    for warning in dict.fromkeys(warnings):
        output.say(f"Warning: {warning}", style="yellow")
