"""Read the part of protobuf's text format that a model's configuration needs."""

from __future__ import annotations

import re
from collections.abc import Iterator

TOKEN = re.compile(
    r"""(?P<comment>\#[^\n]*)|(?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')|(?P<open>[{\[<])|(?P<close>[}\]>])"""
    r"""|(?P<word>[A-Za-z_][\w.+-]*)|(?P<number>[-+.\d][\w.+-]*)|(?P<mark>[:,;])""",
    re.X,
)


def messages(text: str, field: str) -> list[dict[str, list[str]]]:
    """Return each message of a top-level field, as a dict from field names to lists of scalars.

    Nested messages are left out. ``field { ... }`` and ``field [ { ... }, { ... } ]`` are equivalent.
    """
    tokens = iter([t for t in TOKEN.finditer(text) if t.lastgroup not in ("comment", "mark")])
    found: list[dict[str, list[str]]] = []
    name: str | None = None
    for token in tokens:
        if token.lastgroup == "open":
            is_field = name == field
            if is_field and token.group() == "[":
                found += _messages_of_list(tokens)
            elif is_field:
                found.append(_scalars(tokens))
            else:
                _skip(tokens)
            name = None
        else:
            name = token.group() if token.lastgroup == "word" and name is None else None
    return found


def _messages_of_list(tokens: Iterator[re.Match[str]]) -> list[dict[str, list[str]]]:
    found = []
    for token in tokens:
        if token.lastgroup == "close":
            break
        if token.lastgroup == "open":
            found.append(_scalars(tokens))
    return found


def _scalars(tokens: Iterator[re.Match[str]]) -> dict[str, list[str]]:
    """Read a message to its end and return the scalars of its fields, also those in lists."""
    found: dict[str, list[str]] = {}
    name: str | None = None
    for token in tokens:
        kind, value = token.lastgroup, token.group()
        if kind == "close":
            break
        if name is None:
            name = value if kind == "word" else None
        elif kind != "open":
            found.setdefault(name, []).append(value)
            name = None
        elif value == "[":
            if scalars := _list(tokens):
                found.setdefault(name, []).extend(scalars)
            name = None
        else:
            _skip(tokens)
            name = None
    return found


def _list(tokens: Iterator[re.Match[str]]) -> list[str]:
    found = []
    for token in tokens:
        if token.lastgroup == "close":
            break
        if token.lastgroup == "open":
            _skip(tokens)
        else:
            found.append(token.group())
    return found


def _skip(tokens: Iterator[re.Match[str]]) -> None:
    """Skip the rest of a message or list."""
    depth = 1
    for token in tokens:
        depth += {"open": 1, "close": -1}.get(str(token.lastgroup), 0)
        if not depth:
            break
