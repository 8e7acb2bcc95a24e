"""The help of every command appears as it is written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer
from rich.text import Text

from tidegate.cli.app import app


def _helps(command: Any, path: str) -> Iterator[tuple[str, str]]:
    yield path, command.help or ""
    for each in command.params:
        yield f"{path} {each.name}", getattr(each, "help", None) or ""
    for name, child in getattr(command, "commands", {}).items():
        yield from _helps(child, f"{path} {name}")


def test_no_help_gets_an_emoji_or_loses_a_word():
    """Rich reads ``[normal]`` as a style, and ``:KEY:`` as an emoji."""
    written = dict(_helps(typer.main.get_command(app), "tidegate"))
    assert {path: Text.from_markup(text).plain for path, text in written.items()} == written
