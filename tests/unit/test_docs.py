"""What the pages name exists: files, links, settings, targets of make, commands and their options."""

from __future__ import annotations

import ast
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main

from tidegate.cli.app import app

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
FOLDERS = ("benchmarks", "deploy", "docs", "examples", "services", "tests", "tidegate")
GLOBS = ("*.md", "docs/**/*.md", "services/*/README.md", "benchmarks/README.md", "examples/**/README.md")
PAGES = sorted(page for pattern in GLOBS for page in ROOT.glob(pattern))
# Made at run time.
WRITTEN = {"data/dead-letters.jsonl"}
SUFFIXES = r"py|lua|md|sh|toml|yaml|jsonl|pbtxt"


@cache
def files() -> tuple[str, ...]:
    """Every file of the repository that a page may name."""
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    return tuple(str(path.relative_to(ROOT)) for path in [*found, *ROOT.glob("*")])


@cache
def code() -> str:
    """All text that may read a variable of the environment."""
    kinds = (".py", ".sh", ".yaml")
    parts = [(ROOT / name).read_text() for name in files() if name.endswith(kinds)]
    return "\n".join([*parts, (ROOT / "Makefile").read_text(), (ROOT / "deploy" / "Dockerfile").read_text()])


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path):
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    broken = [to for to in targets if "://" not in to and not (page.parent / to).exists()]
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_exist(page: Path):
    named = set(re.findall(rf"`([\w./-]+\.(?:{SUFFIXES}))`", page.read_text())) - WRITTEN
    here = {os.path.normpath(page.parent.relative_to(ROOT) / name): name for name in named}
    there = set(files())
    missing = [
        name
        for path, name in here.items()
        if path not in there and not any(each == name or each.endswith(f"/{name}") for each in there)
    ]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_settings_exist(page: Path):
    known = set(re.findall(r"`(TIDEGATE_\w+)`", (ROOT / "docs" / "settings.md").read_text()))
    named = set(re.findall(r"\bTIDEGATE_[A-Z0-9_]*[A-Z0-9]\b", page.read_text()))
    assert [name for name in sorted(named - known) if name not in code()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_targets_of_make_exist(page: Path):
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make ([a-z-]+)", page.read_text())) <= known


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_their_options_exist(page: Path):
    found = re.findall(r"(?:^ {4}|^\$ |`)tidegate ([a-z][a-z-]+)([^`\n#]*)", page.read_text(), re.M)
    assert wrong_commands(found) == []


def test_commands_that_messages_name_exist():
    paths = [ROOT / name for name in files() if name.endswith(".py") and not name.startswith("tests/")]
    texts = [text for path in paths for text in strings(path.read_text())]
    found = [each for text in texts for each in re.findall(r"(?:`|: )tidegate ([a-z][a-z-]+)([^`\n]*)", text)]
    assert len(found) > 100
    assert wrong_commands(found) == []


def strings(source: str) -> list[str]:
    """Return the strings of a module; a value in an f-string is a dot."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts = [str(part.value) if isinstance(part, ast.Constant) else "." for part in node.values]
            found.append("".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def wrong_commands(found: list[tuple[str, str]]) -> list[str]:
    """Return the commands, and the options of commands, that the command line does not have."""
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    wrong = []
    for name, rest in found:
        command, words = commands.get(name), rest.split()
        if command is None:
            wrong.append(name)
            continue
        command = getattr(command, "commands", {}).get(words[0] if words else "", command)
        known = {"--help"}.union(*([*each.opts, *each.secondary_opts] for each in command.params))
        options = re.findall(r"(?<![\w-])--[a-z-]+", rest)
        wrong += [f"{name} {option}" for option in options if option not in known]
    return wrong
