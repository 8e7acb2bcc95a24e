"""``python -m deploy.docstring_check``: check the first word of each docstring.

A function's docstring must begin with a verb in the imperative. It is wrong if its first word is in a list of
words that are not verbs, or if it begins with a symbol. A class's docstring must not begin with a clause.
Properties and ``__init__`` are not checked, because their docstrings may begin with a noun.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from deploy.size_report import python_files

FOLDERS = {"services", "tidegate", "deploy", "benchmarks"}
_WORDS = """
a about after all also an another any are as at be because been before being both but by each every
everything few for from had has have he her here his how if in is it its like many more most my neither
next no nobody none not nothing of on once one only or other our same she so some something such than
that the their them then there these they this those three to true false two under until up was were what
whatever when where whether which while who whoever whom whose why will with within without your
"""
NO_VERBS = frozenset(_WORDS.split())
# A class's docstring must not begin with one of these words, because they begin a clause.
CLAUSES = frozenset(["how", "what", "when", "where", "whether", "which", "who", "whoever", "why"])
_PROPERTIES = ("property", "cached_property", "computed_field", "fixture", "overload")


def first_word(text: str) -> str:
    """Return the first word in lower case; empty if the text does not begin with a word."""
    word = text.split(maxsplit=1)[0].rstrip(".,:;")
    return word.lower() if word[:1].isalpha() else ""


def complaints(path: Path) -> Iterator[str]:
    """Yield the file, line number and first line of each docstring with a wrong first word."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            text = ast.get_docstring(node)
            if text and first_word(text) in CLAUSES:
                yield f"{path}:{node.lineno} {text.splitlines()[0]}"
            continue
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.name == "__init__":
            continue
        decorators = [ast.unparse(each) for each in node.decorator_list]
        if any(word in each for each in decorators for word in _PROPERTIES):
            continue
        text = ast.get_docstring(node)
        if text and (not (word := first_word(text)) or word in NO_VERBS):
            yield f"{path}:{node.lineno} {text.splitlines()[0]}"


def main() -> int:
    """Print the docstrings with a wrong first word. Return 1 if there are any, else 0."""
    root = Path.cwd()
    paths = [path.relative_to(root) for path in python_files(root)]
    found = [each for path in paths if path.parts[0] in FOLDERS for each in complaints(path)]
    for complaint in found:
        print(complaint, file=sys.stderr)
    if found:
        print(f"{len(found)} docstrings begin with a wrong word", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
