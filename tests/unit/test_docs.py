"""Pages name only files, links, settings, targets of make, commands and options that exist."""

from __future__ import annotations

import ast
import os
import re
from asyncio import Protocol
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main

from services.gateway import app as gateway
from tidegate.cli.app import app

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
FOLDERS = ("benchmarks", "deploy", "docs", "examples", "services", "tests", "tidegate")
GLOBS = ("*.md", "docs/**/*.md", "services/*/README.md", "benchmarks/README.md", "examples/**/README.md")
PAGES = sorted(page for pattern in GLOBS for page in ROOT.glob(pattern))
SERVICES = ("autoscaler", "gateway", "registry", "router", "worker")
# Pages name these for all services at once.
OF_EACH_SERVICE = {"app.py", "__main__.py", "api/", "application/", "adapters/", "domain/"}
# Files that users write or that a running stack makes: they have no place in the repository.
OF_USERS = {
    *("config.pbtxt", "metadata.json", "model.onnx", "model.py", "net.onnx", "pip.conf", "request.json"),
    *("requirements.txt", "sample.json", "signature.json", "tidegate_plan.json", "tidegate_runtime.py"),
    *("config.json", "tokenizer.json", "preprocessor_config.json", "onnx/model.onnx", "conda.yaml"),
    *("code/inference.py", "code/requirements.txt", "index_to_name.json"),
}
OF_A_STACK = {
    *("data/dead-letters.jsonl", "data/gateway-keys.json", "data/gateway-routes.json", "tidegate.env"),
    *("assignment.json", "DIR/assignment.json", "contexts.json", "router-intention.json"),
    *("cache/", "cache/envs/", "home/", "incoming/", "uploads/", "results/", "results.json", "results.png"),
}
SUFFIXES = "py|lua|md|sh|toml|yaml|json|jsonl|pbtxt|txt|lock|conf|env|onnx|png|svg"
# A name in a code span, or a path from the root anywhere; a node id of pytest may follow.
SPAN = re.compile(rf"`([\w.][\w./-]*\.(?:{SUFFIXES})|(?:[\w.-]+/)+)(?:`|::)")
PATH = re.compile(rf"(?<![\w./<-])((?:{'|'.join(FOLDERS)})/[\w./-]*\.(?:{SUFFIXES}))(?![\w/*-])")
NODE = re.compile(r"(tests/[\w/]+\.py)((?:::\w+)+)")


@cache
def files() -> tuple[str, ...]:
    """Return every file of the repository that a page may name."""
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    names = [str(path.relative_to(ROOT)) for path in [*found, *ROOT.glob("*")]]
    return tuple(name for name in names if "__pycache__" not in name)


@cache
def folders() -> tuple[str, ...]:
    """Return the folders that have files of the repository."""
    return tuple({str(each) for name in files() for each in Path(name).parents})


@cache
def code() -> str:
    """Return all text that may read a variable of the environment."""
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
def test_files_exist_and_each_name_means_one(page: Path):
    text = without_addresses(page.read_text())
    named = {*SPAN.findall(text)} - OF_USERS - OF_A_STACK
    wrong = {name: found for name in named if len(found := meant(page, name)) != 1}
    assert wrong == {}
    assert {*PATH.findall(text)} - {*files()} == set()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tests_exist(page: Path):
    for file, names in NODE.findall(page.read_text()):
        source = (ROOT / file).read_text()
        missing = [
            name for name in names.split("::")[1:] if not re.search(rf"(?:def|class) {name}\b", source)
        ]
        assert missing == [], file


def test_architecture_names_files_in_full():
    named = {*SPAN.findall((ROOT / "ARCHITECTURE.md").read_text())} - OF_EACH_SERVICE
    assert [name for name in sorted(named) if name.strip("/") not in {*files(), *folders()}] == []


def test_the_first_step_of_a_request_is_the_class_that_reads_the_connection():
    reads = [each for each in vars(gateway).values() if isinstance(each, type) and issubclass(each, Protocol)]
    (row,) = re.findall(
        r"^\| 1 \| `POST /v2/models/.*\| (.*) \|$", (ROOT / "ARCHITECTURE.md").read_text(), re.M
    )
    assert [f"{each.__module__.replace('.', '/')}.py" for each in reads] == SPAN.findall(row)[:1]


def without_addresses(text: str) -> str:
    return re.sub(r"\w+://\S+", "", text)


def meant(page: Path, name: str) -> list[str]:
    """Return the files or folders that a name on a page may mean.

    Those of the page's own service come first, and in it those of its domain, which is what READMEs explain.
    """
    if name in OF_EACH_SERVICE:
        return [name] if all((ROOT / "services" / each / name).exists() for each in SERVICES) else []
    known = folders() if name.endswith("/") else files()
    name = name.rstrip("/")
    beside = os.path.normpath(page.parent.relative_to(ROOT) / name)
    if exact := {name, beside} & {*known}:
        return [min(exact)]
    found = [each for each in known if each.endswith(f"/{name}")]
    here = page.parent.relative_to(ROOT)
    own = [each for each in found if each.startswith(f"{here}/")]
    return [each for each in own if each == f"{here}/domain/{name}"] or own or found


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
