"""Drift and quality over both clients, against a gateway that answers from memory."""

from __future__ import annotations

from typing import Any

import httpx

from tests.unit.client.test_client import make  # noqa: F401


def test_drift_and_quality_are_read_from_the_router(make: Any) -> None:  # noqa: F811
    asked: list[str] = []

    def plane(request: httpx.Request) -> httpx.Response:
        asked.append(f"{request.method} {request.url.raw_path.decode()}")
        return httpx.Response(200, json={"items": []})

    client = make(plane)
    assert client.drift("a/b") == {"items": []}
    client.drift()
    client.quality("digits")
    client.quality()
    client.rebase_drift("digits")
    assert asked == [
        "GET /api/router/v1/drift/a%2Fb",
        "GET /api/router/v1/drift",
        "GET /api/router/v1/quality/digits",
        "GET /api/router/v1/quality",
        "POST /api/router/v1/drift/digits/rebase",
    ]
