"""The inference core, before a request is queued."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from services.gateway.application.inference.core import InferenceCore
from services.gateway.domain import oip
from services.gateway.domain.replica_fleet import ReplicaFleet
from tests.unit.gateway.test_routing import table
from tidegate.kernel.errors import TidegateError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("fleet", "told"),
    [
        (ReplicaFleet(), "not known before its first replica is ready"),
        (ReplicaFleet(start_ms=60_000), "not known before its first replica is ready"),
        (ReplicaFleet(fault="the model does not load"), "digits-v1 has no replica: the model does not load"),
    ],
)
def test_a_request_that_needs_a_signature_asks_for_a_replica(fleet, told):
    asked: list[str] = []
    routes: Any = SimpleNamespace(table=table([100]))
    dispatcher: Any = SimpleNamespace(demand=lambda route: asked.append(route.name))
    heartbeat: Any = SimpleNamespace(fleet=lambda name: fleet)
    core = InferenceCore(routes, dispatcher, heartbeat)
    with pytest.raises(TidegateError, match=told):
        core.begin("digits", "", None, lambda contract: oip.decode(b"abcd", 0, contract), b"", print)
    assert asked == ["digits-v1"]
