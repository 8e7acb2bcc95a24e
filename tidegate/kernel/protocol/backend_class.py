"""Find the class for Triton's Python backend in the syntax tree of a ``model.py``. Pure.

The command line also uses this module, so it imports only the standard library.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

BACKEND_CLASS = "TritonPythonModel"
DESCRIBES = "auto_complete_config"


def is_for_the_backend(tree: ast.Module) -> bool:
    """Return True for a file that has the class of Triton's Python backend."""
    return BACKEND_CLASS in set(_top_names(tree))


def may_describe_itself(tree: ast.Module) -> bool:
    """Return False if a file for the backend certainly has no ``auto_complete_config``.

    Without this method, the user must provide a signature. If the class is imported, assigned, decorated or
    derived, the method may be elsewhere, so the result is True.
    """
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == BACKEND_CLASS:
            own = {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
            return bool(node.bases or node.decorator_list) or DESCRIBES in own
    return True


def _top_names(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
