"""What a version's Python needs: lines of a ``requirements.txt``, taken in without being carried out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

from tidegate.kernel.errors import BadRequest

FILE = "requirements.txt"
MAX_LINES = 500
MAX_LINE = 2000

# Options that say where packages come from. Others would read files that are not there on the worker, or
# put packages elsewhere than into the environment that is made for them.
_OPTIONS = {
    "-i", "--index-url", "--extra-index-url", "--no-index", "-f", "--find-links", "--trusted-host",
    "--pre", "--prefer-binary", "--only-binary", "--no-binary", "--require-hashes",
}  # fmt: skip
_COMMENT = re.compile(r"(^|\s)#.*$")


def lines_of(text: str, where: str) -> list[str]:
    """The requirements in a text: continuations joined, comments and blank lines gone.

    Raises BadRequest for a line that a worker could not carry out. Whether a package exists is pip's to say.
    """
    joined = re.sub(r"\\\r?\n", " ", text)
    lines = [" ".join(_COMMENT.sub("", line).split()) for line in joined.splitlines()]
    found = list(dict.fromkeys(line for line in lines if line))
    if len(found) > MAX_LINES:
        raise BadRequest(f"{where}: more than {MAX_LINES} requirements.")
    for line in found:
        _check(line, where)
    return found


def gathered(folders: Iterable[PurePosixPath], texts: Mapping[PurePosixPath, str]) -> list[str]:
    """Those of an archive: beside its models, in their folders, and in the version folders with the code."""
    found: list[str] = []
    homes = {home for folder in folders for home in (folder, folder.parent)}
    for path in sorted(texts):
        home = path.parent.parent if path.parent.name.isdecimal() else path.parent
        if path.name == FILE and home in homes:
            found += lines_of(texts[path], str(path))
    return list(dict.fromkeys(found))


def _check(line: str, where: str) -> None:
    if len(line) > MAX_LINE or not line.isprintable():
        raise BadRequest(f"{where}: {line[:80]!r} is not a requirement.")
    if line.startswith("-"):
        option = re.split(r"[=\s]", line, maxsplit=1)[0]
        if option not in _OPTIONS:
            raise BadRequest(
                f"{where}: the option {option[:40]!r} cannot be honoured on a worker; packages, and "
                f"{', '.join(sorted(_OPTIONS))} can."
            )
    elif _is_relative_path(line):
        raise BadRequest(
            f"{where}: {line[:80]!r} is a path that leads nowhere on a worker: give a package's name, a URL "
            "or an absolute path, or put the code beside model.py."
        )


def _is_relative_path(line: str) -> bool:
    first = line.split(";")[0].split(" --")[0].strip()
    named_or_absolute = "@" in first or "://" in first or first.startswith("/")
    return not named_or_absolute and ("/" in first or first.startswith("."))
