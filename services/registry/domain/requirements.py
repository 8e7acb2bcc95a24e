"""Check the requirements of a version: the lines of a ``requirements.txt``. Nothing is installed. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

from tidegate.kernel.errors import BadRequest

FILE = "requirements.txt"
MAX_LINES = 500
MAX_LINE = 2000

# The allowed options. Most of them say where packages come from. All other options are refused,
# because they would read files that the worker does not have, or install packages outside the version's
# environment.
_OPTIONS = {
    "-i", "--index-url", "--extra-index-url", "--no-index", "-f", "--find-links", "--trusted-host",
    "--pre", "--prefer-binary", "--only-binary", "--no-binary", "--require-hashes",
}  # fmt: skip
_COMMENT = re.compile(r"(^|\s)#.*$")


def parse(text: str, where: str) -> list[str]:
    """Return the requirements in a text. Continued lines are joined; comments and blank lines are removed.

    ``where``: the name of the text in messages. Raise BadRequest for a line that no worker can install.
    Packages are not looked up.
    """
    joined = re.sub(r"\\\r?\n", " ", text)
    lines = [" ".join(_COMMENT.sub("", line).split()) for line in joined.splitlines()]
    result = list(dict.fromkeys(line for line in lines if line))
    if len(result) > MAX_LINES:
        raise BadRequest(f"{where}: it has {len(result)} requirements; the limit is {MAX_LINES}.")
    for line in result:
        _check(line, where)
    return result


def gathered(folders: Iterable[PurePosixPath], texts: Mapping[PurePosixPath, str]) -> list[str]:
    """Return the requirements of all models in an archive.

    The file requirements.txt may be in a model's folder, in a version folder, or in the folder above the
    model's folder.
    """
    result: list[str] = []
    homes = {home for folder in folders for home in (folder, folder.parent)}
    for path in sorted(texts):
        home = path.parent.parent if path.parent.name.isdecimal() else path.parent
        if path.name == FILE and home in homes:
            result += parse(texts[path], str(path))
    return list(dict.fromkeys(result))


def _check(line: str, where: str) -> None:
    if len(line) > MAX_LINE or not line.isprintable():
        raise BadRequest(
            f"{where}: {line[:80]!r} is not a requirement. Write one printable line of at most {MAX_LINE} "
            "characters, such as numpy==1.26.4."
        )
    if line.startswith("-"):
        option = re.split(r"[=\s]", line, maxsplit=1)[0]
        if option not in _OPTIONS:
            raise BadRequest(
                f"{where}: the option {option[:40]!r} does not work on a worker. A line can name a package, "
                f"or use one of the options {', '.join(sorted(_OPTIONS))}."
            )
    elif _is_relative_path(line):
        raise BadRequest(
            f"{where}: {line[:80]!r} is a relative path, which does not exist on a worker. Use a package's "
            "name, a URL or an absolute path, or put the code beside model.py."
        )


def _is_relative_path(line: str) -> bool:
    first = line.split(";")[0].split(" --")[0].strip()
    named_or_absolute = "@" in first or "://" in first or first.startswith("/")
    return not named_or_absolute and ("/" in first or first.startswith("."))
