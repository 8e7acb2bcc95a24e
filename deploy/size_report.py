"""``python -m deploy.size_report``: print the longest files and functions; fail if a file is too long."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

FILE_LIMIT = 500
FUNCTION_NOTICE = 50
SHOWN = 5
FOLDERS = ("tidegate", "services", "examples", "deploy", "benchmarks", "tests")


def python_files(root: Path) -> list[Path]:
    """Return the project's Python files: tracked and new files, but not ignored ones."""
    command = ["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard", *FOLDERS]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        return [root / name for name in listed if name.endswith(".py") and (root / name).is_file()]
    except (OSError, subprocess.CalledProcessError):
        return [path for folder in FOLDERS for path in (root / folder).rglob("*.py")]


def functions(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number of lines, ``file:line name``) for every function of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            yield node.end_lineno - node.lineno + 1, f"{path}:{node.lineno} {node.name}"


def main() -> int:
    """Print the report. Return 1 if a file is too long."""
    root = Path.cwd()
    files = python_files(root)
    lengths = sorted(((len(p.read_text().splitlines()), p.relative_to(root)) for p in files), reverse=True)
    longest = sorted((f for p in files for f in functions(p.relative_to(root))), reverse=True)
    print(f"{len(files)} files, {sum(lines for lines, _ in lengths)} lines")
    for lines, path in lengths[:SHOWN]:
        print(f"  {lines:4} lines  {path}")
    for lines, where in longest[:SHOWN]:
        if lines > FUNCTION_NOTICE:
            print(f"  {lines:4} lines  {where}")
    too_long = [f"{path} has {lines} lines" for lines, path in lengths if lines > FILE_LIMIT]
    for problem in too_long:
        print(f"{problem}, and the limit is {FILE_LIMIT}: split the file", file=sys.stderr)
    return 1 if too_long else 0


if __name__ == "__main__":
    sys.exit(main())
