"""The one way of a request, before anything is queued."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from services.gateway.core import Core
from tests.unit.gateway.test_routing import table
from tidegate.errors import Unavailable
from tidegate.protocol import oip

pytestmark = pytest.mark.unit


def test_what_only_a_replica_can_tell_asks_for_one():
    asked: list[str] = []
    routes: Any = SimpleNamespace(table=table([100]))
    dispatcher: Any = SimpleNamespace(demand=lambda route: asked.append(route.name))
    core = Core(routes, dispatcher, reporter=SimpleNamespace())  # type: ignore[arg-type]
    with pytest.raises(Unavailable):
        core.begin("digits", "", None, lambda contract: oip.decode(b"abcd", 0, contract), b"", print)
    assert asked == ["digits-v1"]
