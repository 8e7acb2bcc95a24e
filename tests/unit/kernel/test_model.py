"""The names that a model's file may import do not change what the file does."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import pytest

import tidegate.model
from tidegate import batched

pytestmark = pytest.mark.unit


def test_a_decorated_function_is_the_function():
    def double(x: Any) -> Any:
        return 2 * x

    assert batched(double) is double
    assert batched(max_size=4)(double) is double
    assert double(2) == 4
    with pytest.raises(ValueError, match="must be at least 1"):
        batched(max_size=0)


def run(source: str) -> dict[str, Any]:
    """Run a file as Python does."""
    names: dict[str, Any] = {}
    exec(compile(source, "model.py", "exec", dont_inherit=True), names)
    return names


def test_annotations_can_be_combined():
    source = """
from typing import Annotated, Any, Optional, get_type_hints
from tidegate import Tensor

def predict(x: Tensor["FP32", -1, 4] | None, y: Optional[Tensor[str, 2]]) -> Annotated[Any, Tensor(int, 1)]:
    return x

hints = get_type_hints(predict)
"""
    assert set(run(source)["hints"]) == {"x", "y", "return"}


@pytest.mark.parametrize(
    ("annotation", "told"),
    [("Tensor['FP31', 4]", "unknown datatype 'FP31'"), ("Tensor['FP32', 'four']", "is not a list of sizes")],
)
def test_wrong_annotations_fail_where_the_file_runs(annotation, told):
    with pytest.raises(TypeError, match=told):
        run(f"from tidegate import Tensor\ndef predict(x: {annotation}): ...")


def test_the_module_imports_the_standard_library_only():
    tree = ast.parse(Path(tidegate.model.__file__).read_text())
    imported = {
        (node.module or "").partition(".")[0]
        if isinstance(node, ast.ImportFrom)
        else alias.name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert imported <= sys.stdlib_module_names
