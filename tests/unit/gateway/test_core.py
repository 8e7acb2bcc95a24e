"""The inference core, before a request is queued."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from services.gateway.application.inference.core import InferenceCore
from services.gateway.application.jobs.submission import JobSubmitter
from services.gateway.domain import oip
from services.gateway.domain.contract import Contract, Decoded
from services.gateway.domain.job_options import JobOptions
from services.gateway.domain.replica_fleet import ReplicaFleet
from services.gateway.domain.routing import parse_table
from tests.unit.gateway.test_routing import table
from tidegate.kernel.errors import BadRequest, TidegateError
from tidegate.kernel.protocol.access import ANONYMOUS
from tidegate.kernel.protocol.llm import SIGNATURE

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("fleet", "told"),
    [
        (ReplicaFleet(), "not known until the first replica is ready"),
        (ReplicaFleet(start_ms=60_000), "not known until the first replica is ready"),
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


async def test_a_language_model_takes_no_tensors():
    """Its tensor has the path and the body of a request, which would pass all limits of tokens."""
    entry = {
        "model": "chat", "version": 1, "format": "llm", "signature": SIGNATURE.model_dump(), "max_queue": 10,
        "retry": "safe", "wakeable": True, "ready": 1, "llm": {},
    }  # fmt: skip
    endpoint = {
        "targets": [{"deployment": "chat-v1", "weight": 1}], "versions": {"1": "chat-v1"},
        "default_timeout_ms": 1000,
    }  # fmt: skip
    chat = parse_table(
        {"epoch": "e", "n": 1, "deployments": {"chat-v1": entry}, "endpoints": {"chat": endpoint}}
    )
    routes: Any = SimpleNamespace(table=chat)
    other: Any = SimpleNamespace(store=None)
    core = InferenceCore(routes, other, other)
    submitter = JobSubmitter(core, other, other, other, other, ttl_s=1, retention_s=1, max_queued=1)
    body = (
        b'{"inputs": [{"name": "request", "datatype": "BYTES", "shape": [1],'
        b' "data": ["{\\"path\\": \\"/tidegate/stats\\"}"]}]}'
    )

    def decode(contract: Contract) -> Decoded:
        return oip.decode(body, None, contract)

    for version in ("", "1"):
        with pytest.raises(BadRequest, match="is a language model"):
            core.begin("chat", version, None, decode, b"", print)
        with pytest.raises(BadRequest, match="is a language model"):
            await anext(core.stream("chat", version, None, decode))
        with pytest.raises(BadRequest, match="is a language model"):
            submitter.check("chat", version, decode, JobOptions(), ANONYMOUS)
