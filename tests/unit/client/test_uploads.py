"""Uploads in parts over both clients, against a registry that answers from memory and fails on purpose."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from tests.unit.client.test_client import make  # noqa: F401
from tidegate.client import uploads
from tidegate.client.errors import BadAnswer, BadRequest, Conflict, Unreachable
from tidegate.client.flow import Answer, Send, Sleep

CONTENT = bytes(range(256)) * 5
PART = 300


class Registry:
    """Keeps one upload. ``troubles``: functions that answer the next requests instead."""

    def __init__(self) -> None:
        self.stored = b""
        self.id = "u1"
        self.checks = 1
        self.problem = ""
        self.asked: list[str] = []
        self.troubles: dict[int, Callable[[], httpx.Response]] = {}

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(
            f"{request.method} {request.url.path.removeprefix('/api/registry').removeprefix('/v1')}"
        )
        if (trouble := self.troubles.pop(len(self.asked), None)) is not None:
            return trouble()
        if request.method == "PATCH":
            if request.url.path.rpartition("/")[2] != self.id:
                return httpx.Response(404, json={"error": "no upload", "reason": "not_found"})
            if int(request.headers["Upload-Offset"]) != len(self.stored):
                return httpx.Response(409, json={"error": "elsewhere", "reason": "wrong_offset"})
            self.stored += request.content
        if request.method == "GET":
            self.checks -= 1
        return httpx.Response(200, json=self.document())

    def document(self) -> dict[str, Any]:
        whole = len(self.stored) == len(CONTENT)
        state = "open" if not whole else "verifying" if self.checks > 0 else "stored"
        return {
            "id": self.id,
            "sha256": hashlib.sha256(CONTENT).hexdigest(),
            "size": len(CONTENT),
            "offset": len(self.stored),
            "state": "failed" if whole and self.problem else state,
            "problem": self.problem,
            "part_bytes": PART,
        }


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("FIRST_PAUSE_S", "LONGEST_PAUSE_S", "LONGEST_TURN_S", "CHECK_PAUSE_S"):
        monkeypatch.setattr(uploads, name, 0.0)
    path = tmp_path / "model.bin"
    path.write_bytes(CONTENT)
    return path


def lost() -> httpx.Response:
    raise httpx.ReadError("the connection was lost")


def busy() -> httpx.Response:
    return httpx.Response(503, json={"error": "the store is away", "reason": "unavailable"})


def test_it_continues_after_lost_connections(make: Any, file: Path) -> None:  # noqa: F811
    registry, seen = Registry(), []
    # 1 opens; 3 is the second part; 5 opens again after it was lost.
    registry.troubles = {3: lost, 4: busy}
    done = make(registry).upload(file, progress=lambda offset, problem: seen.append((offset, problem[:15])))
    assert (done["state"], registry.stored) == ("stored", CONTENT)
    assert registry.asked[:5] == [
        "POST /uploads",
        "PATCH /uploads/u1",
        "PATCH /uploads/u1",
        *["POST /uploads"] * 2,
    ]
    assert [offset for offset, problem in seen if not problem] == [0, 300, 600, 900, 1200, 1280]
    assert [problem for _, problem in seen if problem] == ["The gateway doe", "the store is aw"]


def test_stored_bytes_are_not_sent(make: Any, file: Path) -> None:  # noqa: F811
    registry = Registry()
    registry.stored, registry.checks = CONTENT, 0
    assert make(registry).upload(file)["state"] == "stored"
    assert registry.asked == ["POST /uploads"]


def test_it_follows_another_process_and_an_expired_upload(make: Any, file: Path) -> None:  # noqa: F811
    registry = Registry()

    def other_process() -> httpx.Response:
        registry.stored = CONTENT[:700]
        return httpx.Response(409, json={"error": "elsewhere", "reason": "wrong_offset"})

    def expired() -> httpx.Response:
        registry.stored, registry.id = b"", "u2"
        return httpx.Response(404, json={"error": "no upload", "reason": "not_found"})

    registry.troubles = {3: other_process, 5: expired}
    make(registry).upload(file)
    assert registry.stored == CONTENT


def test_two_processes_that_send_the_same_bytes_give_way() -> None:
    now, pauses = [0.0], list[float]()
    upload = orjson.dumps(Registry().document())
    source = uploads.Source.of(io.BytesIO(CONTENT))
    flow = uploads.Uploading(source, "", clock=lambda: now[0]).flow()

    def drive() -> None:
        step = next(flow)
        while True:
            if isinstance(step, Sleep):
                pauses.append(step.seconds)
                now[0] += step.seconds
                step = next(flow)
            elif isinstance(step, Send) and step.method == "PATCH":
                step = flow.send(Answer(409, {}, b'{"error": "elsewhere", "reason": "wrong_offset"}'))
            else:
                step = flow.send(Answer(200, {}, upload))

    with pytest.raises(Conflict):
        drive()
    assert pauses[:4] == [0.2, 0.4, 0.8, 1.6]
    assert max(pauses) == uploads.LONGEST_TURN_S, "a slow connection can send a part in this time"


def test_it_gives_up(make: Any, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    registry = Registry()
    registry.troubles = dict.fromkeys(range(1, 100_000), lost)
    monkeypatch.setattr(uploads, "PATIENCE_S", -1.0)
    with pytest.raises(Unreachable):
        make(registry).upload(file)


def test_wrong_bytes_and_no_progress_are_errors(make: Any, file: Path) -> None:  # noqa: F811
    registry = Registry()
    registry.problem = "The bytes that arrived have another sha256: send them again."
    with pytest.raises(BadRequest, match="send them again"):
        make(registry).upload(file)
    registry = Registry()
    registry.troubles = {2: lambda: httpx.Response(200, json=registry.document())}
    with pytest.raises(BadAnswer, match="stored none of"):
        make(registry).upload(file)
