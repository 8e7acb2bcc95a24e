"""No two files of ``tests/e2e`` deploy different models under one name to the stack that they share.

Which files share a stack depends on the speed of the machine. The second file would get version 2.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

E2E = Path(__file__).resolve().parents[1] / "e2e"
DEPLOYS = ("stack.deploy", "deploy_python")


def test_files_do_not_share_a_name():
    files, models = defaultdict[str, set[str]](set), defaultdict[str, set[str]](set)
    for path in E2E.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and ast.unparse(call.func) in DEPLOYS and len(call.args) > 1:
                model, name = call.args[:2]
                if isinstance(name, ast.Constant):
                    files[str(name.value)].add(path.name)
                    models[str(name.value)].add(ast.unparse(model))
    assert {"sleeper", "cut-off"} <= files.keys(), "the search finds them"
    shared = {name: found for name, found in files.items() if len(found) > 1 and len(models[name]) > 1}
    assert not shared, "choose other names"
