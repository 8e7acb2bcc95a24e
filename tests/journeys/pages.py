"""Reads a page of ``docs/guides``: the files that it writes, the commands that it types, what it shows.

- A ``console`` block holds commands, each after ``$ ``, with what is seen below it. Lines that begin with
  ``> `` go on with the command.
- ``<!-- file: NAME -->`` before a block says that the block is that file.
- ``<!-- not run: REASON -->`` before a block says why a test cannot run it.
- ``<!-- stack: own -->`` and ``<!-- server: s3 -->`` anywhere say what the page needs for itself.
- ``<!-- exit: N -->`` before a block says how its last command ends; without it, every command ends with 0.

What is shown is compared with what is seen. ``...`` stands for anything. What differs from run to run
(durations, sizes, times, ids) is taken as equal.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_MARK = re.compile(r"^<!-- (file|not run|exit|stack|server): (.+?) -->$")
_FENCE = re.compile(r"^```(\w*)\s*$")


@dataclass(frozen=True, slots=True)
class Command:
    """One command, what is shown below it, and the exit code that it must have."""

    text: str
    shown: str
    line: int
    exit: int = 0


@dataclass(frozen=True, slots=True)
class File:
    """A file that the reader writes."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Skipped:
    """A block that a test cannot run, and why."""

    reason: str
    line: int


Step = Command | File | Skipped


@dataclass(frozen=True, slots=True)
class Page:
    """A page: its steps in order, whether it needs a stack of its own, and a server: s3, postgresql."""

    path: Path
    steps: list[Step] = field(default_factory=list)
    own_stack: bool = False
    server: str = ""


def read(path: Path) -> Page:
    """Return the steps of a page. Raise ValueError for a mark that belongs to no block."""
    steps: list[Step] = []
    of_page: dict[str, str] = {}
    marks: dict[str, str] = {}
    lines = iter(enumerate(path.read_text().splitlines(), 1))
    for number, line in lines:
        if found := _MARK.match(line):
            of = of_page if found[1] in ("stack", "server") else marks
            of[found[1]] = found[2]
        elif fence := _FENCE.match(line):
            block = [each for _, each in _until_fence(lines)]
            steps += _steps(fence[1], block, marks, number)
            marks = {}
        elif line.strip() and marks:
            raise ValueError(f"{path.name}:{number}: {marks} is not before a block")
    return Page(path, steps, "stack" in of_page, of_page.get("server", ""))


def _until_fence(lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    for number, line in lines:
        if line.startswith("```"):
            return
        yield number, line


def _steps(kind: str, block: list[str], marks: dict[str, str], line: int) -> Iterator[Step]:
    if "not run" in marks:
        yield Skipped(marks["not run"], line)
    elif "file" in marks:
        yield File(marks["file"], "\n".join(block) + "\n")
    elif kind == "console":
        commands = list(_commands(block, line))
        last = len(commands) - 1
        for at, command in enumerate(commands):
            code = int(marks.get("exit", 0)) if at == last else 0
            yield Command(command.text, command.shown, command.line, code)


def _commands(block: list[str], line: int) -> Iterator[Command]:
    text: list[str] = []
    shown: list[str] = []
    began = line
    for number, each in enumerate(block, line + 1):
        if each.startswith("$ "):
            if text:
                yield Command("\n".join(text), "\n".join(shown), began)
            text, shown, began = [each[2:]], [], number
        elif each.startswith("> ") and not shown:
            text.append(each[2:])
        else:
            shown.append(each)
    if text:
        yield Command("\n".join(text), "\n".join(shown), began)


# What differs from run to run, with the word that stands in its place.
_VARYING = (
    (re.compile(r"\x1b\[[0-9;]*m"), ""),
    (re.compile(r"\b\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d:?\d\d)?"), "<time>"),
    (re.compile(r"\b\d{4}-\d\d-\d\d\b"), "<day>"),
    (re.compile(r"\b\d\d:\d\d:\d\d\b"), "<time>"),
    (re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f-]{17,22}\b"), "<id>"),
    (re.compile(r"\b(?=[0-9a-f]*\d)[0-9a-f]{16,64}\b"), "<id>"),
    (re.compile(r"\btg_[\w-]+"), "<key>"),
    (re.compile(r"\b\d+(\.\d+)?( ?)(s|ms|µs|min|h|d|B|KiB|MiB|GiB|kB|MB|GB|bytes|requests/s)\b"), r"<n>\2\3"),
    (re.compile(r"\b(pid|process) \d+"), r"\1 <n>"),
    (re.compile(r"[─━┄╌-]{4,}"), "----"),
    (re.compile(r"[ \t]+"), " "),
)


def comparable(text: str) -> str:
    """Return a text without what differs from run to run."""
    for pattern, instead in _VARYING:
        text = pattern.sub(instead, text)
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())


def matches(shown: str, seen: str) -> bool:
    """Return True if what a page shows is what was seen."""
    parts = [re.escape(part.strip()) for part in comparable(shown).split("...")]
    pattern = r"\s*" + ".*?".join(parts) + r"\s*"
    return re.fullmatch(pattern, comparable(seen), re.DOTALL) is not None
