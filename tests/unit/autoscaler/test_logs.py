"""Test the logs of a Deployment from files and from an engine, as the API returns them."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from services.autoscaler.application.log_reader import LogReader
from tidegate.kernel.errors import NotFound, Unavailable
from tidegate.kernel.log_files import LogFolder


def line(at: float, message: str, **more: str) -> str:
    told = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
    return json.dumps({"time": told, "message": message} | more) + "\n"


class Engine:
    """A launcher whose replicas write to an engine, not to files."""

    def __init__(self, **output: str) -> None:
        self._output = output

    async def output(self, replica: str, lines: int) -> str:
        if replica.endswith("-9"):
            raise Unavailable("the engine does not answer")
        return self._output.get(replica.replace("-", "_"), "")


@pytest.fixture
def logs(tmp_path: Path) -> LogReader:
    (tmp_path / "worker-m-v1-0-1.log").write_text(line(1, "of the dead one", request_id="r"))
    (tmp_path / "gateway.log").write_text(line(0.5, "secret", request_id="r"))
    engine: Any = Engine(m_v1_0_2=line(2, "of the one that runs", request_id="r") + line(3, "other"))
    return LogReader(LogFolder(tmp_path), engine, lambda: None, lambda: ["m-v1-0-2", "m-v1-0-9"])


async def read(logs: LogReader, name: str, *, services: bool = False, **how: Any) -> list[str]:
    given = {"since": -1.0, "until": 1e11, "lines": 100} | how
    return [each["message"] for each in await logs.read(name, services=services, **given)]


async def test_what_the_engine_has_is_merged_with_what_is_kept(logs: LogReader) -> None:
    assert await read(logs, "m") == ["of the dead one", "of the one that runs", "other"]
    assert await read(logs, "m-v1-0-2", since=2.5) == ["other"]
    assert await read(logs, "m-v1", until=1.5) == ["of the dead one"]
    assert await read(logs, "m", lines=1) == ["other"]


async def test_services_are_for_operators(logs: LogReader) -> None:
    assert await read(logs, "gateway", services=True) == ["secret"]
    with pytest.raises(NotFound):
        await read(logs, "gateway")


async def test_a_request_is_found_in_both(logs: LogReader) -> None:
    found = [(each["log"], each["message"]) for each in await logs.of_request("r")]
    assert found == [
        ("gateway", "secret"),
        ("m-v1-0-1", "of the dead one"),
        ("m-v1-0-2", "of the one that runs"),
    ]
