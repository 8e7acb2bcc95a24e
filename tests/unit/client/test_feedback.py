"""Feedback from the SDK: what is sent, and what becomes of the answer."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import httpx
import numpy as np
import orjson
import pytest

from tidegate import AsyncClient, Client
from tidegate.client.feedback import item_of
from tidegate.client.result import InferResult
from tidegate.kernel.errors import NotFound

pytestmark = pytest.mark.unit


def result(feedback_id: str) -> InferResult:
    return InferResult(
        {"y": np.zeros(1)},
        model_name="digits",
        model_version="1",
        request_id="r",
        timing={},
        parameters={},
        feedback_id=feedback_id,
    )


class Gateway:
    """A gateway that keeps what it gets, and accepts everything but the id ``unknown``."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        assert (request.method, request.url.path) == ("POST", "/v1/feedback")
        body = orjson.loads(request.content)
        self.sent.append(body)
        items = body if isinstance(body, list) else [body]
        if items[0].get("request_id") == "unknown":
            return httpx.Response(
                404, json={"error": "no answer", "reason": "unknown_answer", "request_id": ""}
            )
        told = [{"index": at, "status": "accepted"} for at in range(len(items))]
        return httpx.Response(202, json={"accepted": len(items), "items": told})


def test_one_answer():
    gateway = Gateway()
    with Client("http://gateway", transport=httpx.MockTransport(gateway)) as client:
        assert client.feedback(result("fb1.a"), score=0.5)["accepted"] == 1
        client.feedback("fb1.b", label="cat", at=datetime(2026, 1, 2, tzinfo=UTC))
        client.feedback(idempotency_key="k", metric="clicks", value=3)
        with pytest.raises(NotFound, match="no answer"):
            client.feedback("unknown", reward=1)
    assert gateway.sent[0] == {"request_id": "fb1.a", "score": 0.5}
    assert gateway.sent[1]["label"] == "cat"
    assert datetime.fromisoformat(gateway.sent[1]["at"]) == datetime(2026, 1, 2, tzinfo=UTC)
    assert gateway.sent[2] == {"idempotency_key": "k", "metric": "clicks", "value": 3}


def test_many_answers_in_calls_of_a_thousand():
    gateway = Gateway()
    with Client("http://gateway", transport=httpx.MockTransport(gateway)) as client:
        told = client.feedback_many({"request_id": f"fb1.{at}", "score": at} for at in range(2500))
        assert client.feedback_many([]) == []
    assert [len(each) for each in gateway.sent] == [1000, 1000, 500]
    assert [each["index"] for each in told] == list(range(2500))


async def test_the_asynchronous_client():
    gateway = Gateway()
    async with AsyncClient("http://gateway", transport=httpx.MockTransport(gateway)) as client:
        await client.feedback(result("fb1.a"), reward=1.0)
        assert len(await client.feedback_many([{"request_id": "fb1.a", "score": 1}])) == 1
    assert gateway.sent[0] == {"request_id": "fb1.a", "reward": 1.0}


def test_an_answer_without_an_id():
    with pytest.raises(TypeError, match="collects no feedback"):
        item_of(result(""), None, {"score": 1}, None)
    with pytest.raises(TypeError, match="needs a result, a job or an id"):
        item_of(5, None, {"score": 1}, None)
