"""An upload in parts says how it goes on: after a lost connection, after Ctrl-C, and when it is given up."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from tests.unit.client.test_uploads import CONTENT, Registry
from tidegate.cli import uploading
from tidegate.cli.api import Service
from tidegate.cli.package import Package
from tidegate.cli.progress import Steps
from tidegate.client import uploads
from tidegate.client.errors import Unreachable

Run = Callable[[Registry], list[int]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Upload CONTENT to a registry, and return the numbers of bytes that the progress bar was moved by."""
    for name in ("FIRST_PAUSE_S", "LONGEST_PAUSE_S", "CHECK_PAUSE_S"):
        monkeypatch.setattr(uploads, name, 0.0)

    def upload(registry: Registry) -> list[int]:
        moved: list[int] = []
        service = Service("registry", "http://registry", "token", httpx.MockTransport(registry))
        control: Any = SimpleNamespace(registry=service)
        digest = hashlib.sha256(CONTENT).hexdigest()
        package = Package(io.BytesIO(CONTENT), "model.bin", len(CONTENT), digest)
        uploading.upload_in_parts(control, package, Steps(), moved.append)
        return moved

    return upload


def interrupted() -> httpx.Response:
    raise KeyboardInterrupt


def lost() -> httpx.Response:
    raise httpx.ReadError("the connection was lost")


def test_after_ctrl_c_the_same_command_goes_on(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    registry = Registry()
    registry.troubles = {4: interrupted}
    with pytest.raises(KeyboardInterrupt):
        run(registry)
    said = capsys.readouterr().err
    assert "stopped at 600 B of 1.28 kB" in said
    assert "run the same command again" in said
    assert sum(run(registry)) == len(CONTENT)
    assert registry.stored == CONTENT
    assert "continues at 600 B of 1.28 kB" in capsys.readouterr().err


def test_a_lost_connection_is_shown(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    registry = Registry()
    registry.troubles = {3: lost}
    assert sum(run(registry)) == len(CONTENT)
    said = capsys.readouterr().err
    assert "upload: waiting (The registry does not answer" in said
    assert "upload: sending (model.bin, 300 B of 1.28 kB)" in said


def test_uploads_are_listed_and_deleted(plane: Any, tidegate: Any) -> None:
    unfinished = Registry()
    unfinished.stored = CONTENT[:600]
    plane.answers |= {
        "GET /v1/uploads": {"items": [unfinished.document()]},
        "DELETE /v1/uploads/u1": lambda _: httpx.Response(204),
    }
    assert "600 B of 1.28 kB" in tidegate("uploads")[1]
    assert "Deleted upload u1" in tidegate("uploads", "--delete", "u1")[1]
    assert plane.seen[-1] == "registry DELETE /v1/uploads/u1"


def test_an_upload_that_is_given_up_says_what_to_do(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "PATIENCE_S", -1.0)
    registry = Registry()
    registry.troubles = dict.fromkeys(range(3, 1000), lost)
    with pytest.raises(Unreachable, match="run the same command again"):
        run(registry)
