"""Verifications over both clients, against a gateway that answers from memory."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.unit.client.test_client import make  # noqa: F401
from tidegate.kernel.errors import DeadlinePassed


def test_a_version_is_verified_and_its_end_is_waited_for(make: Any) -> None:  # noqa: F811
    states = ["pending", "verified", "verified"]
    asked: list[tuple[str, bytes]] = []

    def plane(request: httpx.Request) -> httpx.Response:
        asked.append((f"{request.method} {request.url.raw_path.decode()}", request.content))
        return httpx.Response(200, json={"state": "pending" if request.method == "POST" else states.pop(0)})

    client = make(plane)
    assert client.verify("a/b", 2, [{"inputs": []}])["state"] == "pending"
    assert client.wait_verified("a/b", 2)["state"] == "verified"
    assert client.verification("a/b", 2) == {"state": "verified"}
    path = "/api/registry/v1/models/a%2Fb/versions/2/verification"
    assert [each for each, _ in asked] == [f"POST {path}", *[f"GET {path}"] * 3]
    assert json.loads(asked[0][1]) == {"samples": [{"inputs": []}]}


def test_the_wait_for_a_verification_has_an_end(make: Any) -> None:  # noqa: F811
    client = make(lambda _: httpx.Response(200, json={"state": "pending"}))
    with pytest.raises(DeadlinePassed, match="tidegate verify m --version 1"):
        client.wait_verified("m", 1, timeout_s=0.0)
