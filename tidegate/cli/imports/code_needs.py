"""Find which packages the Python code of an imported model needs, without running it."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

from tidegate.kernel.protocol.mlflow_requirements import name_of

# For each module, the package that provides it. The containers of other systems have these packages. The
# Python environment in which Tidegate runs models does not.
_PACKAGES = {
    "torch": "torch", "torchvision": "torchvision", "torchaudio": "torchaudio",
    "transformers": "transformers",
    "xgboost": "xgboost", "lightgbm": "lightgbm", "catboost": "catboost", "pandas": "pandas",
    "PIL": "pillow", "cv2": "opencv-python-headless", "yaml": "pyyaml", "requests": "requests",
    "tensorflow": "tensorflow", "sentence_transformers": "sentence-transformers",
    "tokenizers": "tokenizers", "skimage": "scikit-image", "nltk": "nltk", "spacy": "spacy",
}  # fmt: skip
LARGEST = 4 * 1024 * 1024


def modules_in(files: Iterable[Path]) -> set[str]:
    """Return the top-level modules that Python files import.

    Skip files of more than ``LARGEST`` bytes, and files with invalid syntax.
    """
    found: set[str] = set()
    for file in files:
        if file.stat().st_size > LARGEST:
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError, RecursionError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {each.name.partition(".")[0] for each in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found


def missing(modules: Iterable[str], requirements: Iterable[str]) -> list[str]:
    """Return the packages that ``modules`` need and that ``requirements`` does not list.

    Only packages in ``_PACKAGES`` are returned.
    """
    stated = {name_of(line) for line in requirements}
    return sorted({_PACKAGES[name] for name in modules if name in _PACKAGES} - stated)


def lines_of(file: Path) -> list[str]:
    """Return the lines of a requirements file, without comments; empty if there is no file."""
    if not file.is_file():
        return []
    lines = (line.partition("#")[0].strip() for line in file.read_text(errors="replace").splitlines())
    return [line for line in lines if line]
