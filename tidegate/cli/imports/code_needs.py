"""Find which packages the Python code of an imported model needs, without running it."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

from tidegate.kernel.protocol.mlflow_requirements import name_of

# The package that provides each module. Containers of other systems have these packages, but the models'
# environment does not.
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
    """Return the top-level modules that Python files import. Files with invalid syntax are skipped."""
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
    """Return the packages to add for the imported modules.

    They are packages that neither ``requirements`` nor the models' Python contain.
    """
    stated = {name_of(line) for line in requirements}
    return sorted({_PACKAGES[name] for name in modules if name in _PACKAGES} - stated)


def lines_of(file: Path) -> list[str]:
    """Return the lines of a requirements file, without comments; empty if there is no file."""
    if not file.is_file():
        return []
    lines = (line.partition("#")[0].strip() for line in file.read_text(errors="replace").splitlines())
    return [line for line in lines if line]
