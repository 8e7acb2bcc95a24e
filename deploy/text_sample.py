"""``python -m deploy.text_sample``: print a random sample of the source's docstrings, comments and messages.

A reader who is new to the project decides if each text is clear at first reading. The same seed and source
always result in the same sample.
"""

from __future__ import annotations

import argparse
import ast
import io
import random
import subprocess
import sys
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDERS = ("services", "tidegate", "deploy")
MESSAGE_WORDS = 5


@dataclass(frozen=True, slots=True, order=True)
class Text:
    """A text of the source: its place, its kind, and the text itself."""

    path: str
    line: int
    kind: str
    text: str


def docstrings(path: str, tree: ast.AST) -> Iterator[Text]:
    """Yield the docstrings of a module, its classes and its functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield Text(path, node.body[0].lineno, "docstring", text)


def comments(path: str, source: str) -> Iterator[Text]:
    """Yield the comments. Consecutive comment lines are one comment."""
    lines: list[str] = []
    first = last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        alone = not token.line[: token.start[1]].strip()
        if lines and not (alone and token.start[0] == last + 1):
            yield Text(path, first, "comment", "\n".join(lines))
            lines = []
        if not lines:
            first = token.start[0]
        lines.append(token.string.lstrip("# "))
        last = token.start[0]
    if lines:
        yield Text(path, first, "comment", "\n".join(lines))


def messages(path: str, tree: ast.AST) -> Iterator[Text]:
    """Yield all strings of several words, except docstrings. Examples: error messages, log messages."""
    documented = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if id(node) in documented | inner:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
        elif isinstance(node, ast.JoinedStr):
            text = ast.unparse(node)[2:-1]
        else:
            continue
        if len(text.split()) >= MESSAGE_WORDS and any(word.isalpha() for word in text.split()):
            yield Text(path, node.lineno, "message", text)


def texts(root: Path) -> list[Text]:
    """Return all texts of the tracked Python files below ``root``, in order."""
    listed = subprocess.run(
        ["git", "-C", str(root), "ls-files", *FOLDERS], capture_output=True, text=True, check=True
    ).stdout
    found: list[Text] = []
    for path in (name for name in listed.splitlines() if name.endswith(".py")):
        source = (root / path).read_text()
        tree = ast.parse(source)
        found += [*docstrings(path, tree), *comments(path, source), *messages(path, tree)]
    return sorted(found)


def main() -> int:
    """Print the sample."""
    parser = argparse.ArgumentParser(prog="deploy.text_sample", description="Texts of the source, at random.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=60)
    given = parser.parse_args()
    found = texts(Path.cwd())
    print(f"{given.count} of {len(found)} texts, seed {given.seed}")
    for number, text in enumerate(random.Random(given.seed).sample(found, given.count), 1):
        print(f"\n{number}. {text.kind}, {text.path}:{text.line}")
        print(textwrap.indent(text.text, "   "))
    return 0


if __name__ == "__main__":
    sys.exit(main())
