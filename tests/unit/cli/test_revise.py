"""A command that reads an object and writes it back does not undo what somebody else has written."""

from __future__ import annotations

from typing import Any

import httpx
import orjson
import pytest

from tidegate.cli.api import REVISIONS, Service
from tidegate.kernel.errors import PreconditionFailed


class Registry:
    """Keeps one endpoint. ``others``: what another caller writes after each of the first GETs."""

    def __init__(self, *others: dict[str, Any]) -> None:
        self.endpoint: dict[str, Any] = {"name": "e", "revision": 1, "weight": 1, "sticky": ""}
        self.others = list(others)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            answer = httpx.Response(200, json=self.endpoint)
            if self.others:
                self._write(self.others.pop(0))
            return answer
        if request.headers["If-Match"] != f'"{self.endpoint["revision"]}"':
            return httpx.Response(412, json={"error": "it has changed", "reason": "precondition_failed"})
        self._write(orjson.loads(request.content))
        return httpx.Response(200, json=self.endpoint)

    def _write(self, fields: dict[str, Any]) -> None:
        self.endpoint = {**self.endpoint, **fields, "revision": self.endpoint["revision"] + 1}


def service(registry: Registry) -> Service:
    return Service("registry", "http://registry", "token", httpx.MockTransport(registry))


def test_both_changes_stay() -> None:
    registry = Registry({"sticky": "header:X-User"})
    found = service(registry).revise("/e", lambda stored: {"weight": stored["weight"] + 1})
    assert found == {"name": "e", "revision": 3, "weight": 2, "sticky": "header:X-User"}


def test_no_change_is_not_written_and_a_busy_object_is_an_error() -> None:
    registry = Registry()
    assert service(registry).revise("/e", lambda _: {})["revision"] == 1
    busy = Registry(*[{"sticky": str(number)} for number in range(REVISIONS)])
    with pytest.raises(PreconditionFailed, match="it has changed"):
        service(busy).revise("/e", lambda _: {"weight": 5})
    assert busy.endpoint["weight"] == 1
