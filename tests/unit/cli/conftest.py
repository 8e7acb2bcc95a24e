"""A control plane that answers from a table, for commands that are run as a whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer

from tidegate.cli import api, app, output

# A process builds the tree of its commands once; hundreds of tests in one process need not do so each.
COMMANDS = typer.main.get_command(app.app)

Route = Callable[[httpx.Request], httpx.Response] | Any


@dataclass
class Plane:
    """``answers``: "METHOD /path" -> JSON, or a function of the request. Everything else is a 404."""

    answers: dict[str, Route] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    down: set[str] = field(default_factory=set)

    def handler(self, service: str) -> Callable[[httpx.Request], httpx.Response]:
        def handle(request: httpx.Request) -> httpx.Response:
            if service in self.down:
                raise httpx.ConnectError("refused")
            key = f"{request.method} {request.url.path}"
            self.seen.append(f"{service} {key}")
            self.bodies.append(request.read())
            if key not in self.answers:
                told = {"error": f"No {request.url.path}.", "reason": "not_found", "request_id": "r"}
                return httpx.Response(404, json=told)
            answer = self.answers[key]
            if callable(answer):
                found = answer(request)
                assert isinstance(found, httpx.Response)
                return found
            return httpx.Response(200, json=answer)

        return handle


@pytest.fixture
def plane(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Plane:
    """The control plane; every service that the CLI makes is wired to it."""
    found = Plane()
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("TIDEGATE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TIDEGATE_SERVICE_TOKEN", "t")
    monkeypatch.setenv("TIDEGATE_CONFIG_DIR", str(tmp_path / "config"))

    class Wired(api.Service):
        def __init__(self, name: str, url: str, token: str) -> None:
            super().__init__(name, url, token, httpx.MockTransport(found.handler(name)))

    monkeypatch.setattr(api, "Service", Wired)
    return found


@pytest.fixture(autouse=True)
def _fresh_console() -> None:
    # The consoles hold on to the streams of the test before.
    output.console.cache_clear()


@pytest.fixture
def tidegate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Runs a command line: exit code, stdout, stderr."""
    monkeypatch.setattr(app, "app", COMMANDS)

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            app.main(list(arguments))
        code = ended.value.code or 0
        assert isinstance(code, int)
        return code, *capsys.readouterr()

    return run
