"""Jobs by both clients, against a gateway that answers from memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import orjson
import pytest

from tests.conftest import PATIENCE_S
from tidegate import AsyncClient, Client
from tidegate.client.codec import HEAD_LENGTH
from tidegate.kernel import errors

pytestmark = pytest.mark.unit

ID = "0" * 31 + "1"


class Gateway:
    """One job at a time; ``turns`` is how often it is asked before the job is over."""

    def __init__(self) -> None:
        self.turns = 2
        self.end = "succeeded"
        self.sent: list[httpx.Request] = []
        self.heads: list[dict[str, Any]] = []
        self.broken = 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.sent.append(request)
        match request.method, request.url.path:
            case "GET", "/v2/models/double" | "/v2/models/double/versions/1":
                inputs = [{"name": "x", "datatype": "FP32", "shape": [-1]}]
                return httpx.Response(200, json={"name": "double", "inputs": inputs})
            case "POST", "/v1/jobs":
                if self.broken:
                    self.broken -= 1
                    raise httpx.ReadError("cut")
                self.heads.append(orjson.loads(request.content[: int(request.headers[HEAD_LENGTH])]))
                return self._job("queued", 202)
            case "GET", path if path == f"/v1/jobs/{ID}":
                self.turns -= 1
                return self._job("running" if self.turns >= 0 else self.end)
            case "GET", path if path == f"/v1/jobs/{ID}/result":
                return self._result()
            case "DELETE", path if path == f"/v1/jobs/{ID}":
                return self._job("cancelled")
            case "POST", path if path == f"/v1/jobs/{ID}/retry":
                return self._job("queued", 202)
        return httpx.Response(404, json={"error": "no job", "reason": "not_found", "request_id": "r"})

    def _job(self, status: str, code: int = 200) -> httpx.Response:
        over = status not in {"queued", "running"}
        return httpx.Response(
            code, json={"id": ID, "status": status, "finished_at": "2024-01-01T00:00:00Z" if over else None}
        )

    def _result(self) -> httpx.Response:
        if self.end == "failed":
            told = {"error": "it broke", "reason": "model_failed", "request_id": "r"}
            return httpx.Response(500, json=told)
        outputs = [{"name": "y", "datatype": "FP32", "shape": [2], "data": [2.0, 4.0]}]
        return httpx.Response(200, json={"model_name": "double", "model_version": "1", "outputs": outputs})


class Both:
    """The blocking client and the other one, called alike."""

    def __init__(self, kind: str, gateway: Gateway) -> None:
        transport = httpx.MockTransport(gateway)
        made = Client if kind == "sync" else AsyncClient
        self.client: Any = made("http://gateway", timeout_s=5, transport=transport)

    def __call__(self, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        async def awaited() -> Any:
            return await call(*arguments, **named)

        if isinstance(self.client, Client):
            return call(*arguments, **named)
        return self.loop.run_until_complete(awaited())

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_event_loop()


@pytest.fixture
def gateway() -> Gateway:
    return Gateway()


@pytest.fixture(params=["sync", "async"])
def both(request, gateway) -> Any:
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    found = Both(request.param, gateway)
    yield found
    found(found.client.close)
    asyncio.set_event_loop(None)
    loop.close()


def test_from_submit_to_result(both, gateway):
    job = both(
        both.client.submit,
        "double",
        np.array([1, 2], "f4"),
        version=1,
        priority="high",
        ttl_s=60,
        webhook="https://example.org/",
        metadata={"a": 1},
        parameters={"k": "v"},
    )
    assert (job.id, job.document["status"]) == (ID, "queued")
    (head,) = gateway.heads
    assert (head["model"], head["version"], head["priority"], head["ttl_s"]) == ("double", "1", "high", 60)
    assert (head["webhook"], head["metadata"]) == ("https://example.org/", {"a": 1})
    assert head["parameters"] == {"k": "v", "binary_data_output": True}
    result = both(job.result, timeout_s=30)
    assert result["y"].tolist() == [2.0, 4.0]
    waits = [request.headers["prefer"] for request in gateway.sent if "prefer" in request.headers]
    assert waits == ["wait=20"] * 3


def test_sending_again_is_the_same_job(both, gateway):
    gateway.broken = 1
    both(both.client.submit, "double", np.array([1, 2], "f4"))
    keys = [request.headers["idempotency-key"] for request in gateway.sent if request.method == "POST"]
    assert len(keys) == 2
    assert len(set(keys)) == 1
    both(both.client.submit, "double", np.array([1, 2], "f4"), idempotency_key="mine")
    assert gateway.sent[-1].headers["idempotency-key"] == "mine"


def test_status_wait_cancel_retry(both, gateway):
    job = both(both.client.job, ID)
    assert both(job.status) == "running"
    assert both(job.wait, PATIENCE_S) == "succeeded"
    assert both(job.cancel) == "cancelled"
    again = both(job.retry)
    assert (again.id, again.document["status"]) == (ID, "queued")
    assert ID in repr(again)


def test_a_failed_job_raises_its_failure(both, gateway):
    gateway.end = "failed"
    job = both(both.client.submit, "double", np.array([1, 2], "f4"))
    assert both(job.wait) == "failed"
    with pytest.raises(errors.ModelFailed, match="it broke"):
        both(job.result)


def test_waiting_ends(both, gateway):
    gateway.turns = 10**9
    job = both(both.client.job, ID)
    with pytest.raises(errors.DeadlinePassed, match="running"):
        both(job.wait, 0)


def test_a_job_that_is_not_there(both):
    with pytest.raises(errors.NotFound):
        both(both.client.job, "f" * 32)
