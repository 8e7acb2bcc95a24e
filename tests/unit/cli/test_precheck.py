"""What ``deploy`` refuses of a Python file before it uploads anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tidegate.cli.deploy_request import DeployRequest
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.precheck import check_here
from tidegate.kernel.errors import BadRequest

pytestmark = pytest.mark.unit

CLEAR = "def predict(x: float) -> float: ..."
UNCLEAR = "def predict(x): ..."
BACKEND = "class TritonPythonModel:\n    def execute(self, requests): ..."
X = {"name": "x", "datatype": "FP32", "shape": [1]}
GIVEN = {"inputs": [X], "outputs": [{**X, "name": "y"}]}


def check(folder: Path, source: str, signature: Any = None) -> None:
    path = folder / "mine.py"
    path.write_text(source)
    check_here(DeployRequest(path=path, name="mine", signature=signature))


@pytest.mark.parametrize(
    ("source", "signature"),
    [(CLEAR, None), (UNCLEAR, GIVEN), (BACKEND, GIVEN), (UNCLEAR, {"inputs": "the registry refuses this"})],
)
def test_what_is_uploaded(tmp_path, source, signature):
    check(tmp_path, source, signature)


@pytest.mark.parametrize(
    ("source", "signature", "error", "told"),
    [
        (UNCLEAR, None, BadRequest, "`x` has no annotation.*--signature"),
        (CLEAR.replace("x:", "z:"), GIVEN, BadRequest, "'x' is not among them"),
        ("y = 1", None, BadRequest, "a function `predict`, a class with a method"),
        (BACKEND, None, UsageError, "Give --signature FILE.json"),
        ("def predict(", None, UsageError, "is not valid Python"),
    ],
)
def test_what_is_refused(tmp_path, source, signature, error, told):
    with pytest.raises(error, match=told):
        check(tmp_path, source, signature)
