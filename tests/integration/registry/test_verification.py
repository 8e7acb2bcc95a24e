"""The registry's part of a verification: pending, then verified or rejected, and what each state allows."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integration.registry.onnx_files import onnx_bytes

CARD: dict[str, Any] = {"requests_per_s": 50.0, "memory_mb": 180, "measured_at": "2026-01-01T00:00:00Z"}


@pytest.fixture
async def verifying(opened):
    """A registry that has versions verified."""
    async with opened(verification="on") as caller:
        yield caller


def path(number: int) -> str:
    return f"/v1/models/m/versions/{number}/verification"


async def settle(call: Any, number: int, state: str, *, round_: int = 1, **more: Any) -> Any:
    return await call("PUT", f"{path(number)}/result", {"round": round_, "state": state, **more})


async def test_only_a_verified_version_is_deployed(verifying):
    sample = {"inputs": [], "expected": {"y": [1]}}
    asked = {"deployment": {"threads": 2, "min_replicas": 7}, "samples": [sample]}
    made = await verifying.register("m", onnx_bytes(1), verification=asked)
    assert made["verification"]["state"] == "pending"
    task = await verifying("GET", f"{path(1)}/task")
    assert (task["deployment"]["threads"], task["deployment"]["min_replicas"]) == (2, 1)
    assert task["task"] == {"round": 1, "samples": [sample]}
    refused = await verifying("POST", "/v1/deploy", {"model": "m"}, status=409)
    assert refused["reason"] == "not_verified"

    found = await settle(verifying, 1, "verified", card=CARD)
    assert (found["state"], found["card"]["memory_mb"]) == ("verified", 180)
    await verifying("POST", "/v1/deploy", {"model": "m"})
    (entry, *_) = [each for each in (await verifying("GET", "/v1/audit"))["items"] if each["name"] == "m/1"]
    assert entry["after"]["verification"]["state"] == "verified"
    await verifying("DELETE", "/v1/models/m?cascade=true")


async def test_a_rejected_version_gets_no_traffic_unless_forced(verifying):
    await verifying.register("m", onnx_bytes(1))
    await settle(verifying, 1, "verified")
    await verifying("POST", "/v1/deploy", {"model": "m"})
    await verifying.register("m", onnx_bytes(2))
    await settle(verifying, 2, "rejected", message="Triton says: no")
    target = {"targets": [{"deployment": "m-v2"}]}
    for method, where, body in (
        ("POST", "/v1/deploy", {"model": "m", "version": 2}),
        ("PUT", "/v1/deployments/m-v2", {"model": "m", "version": 2}),
        ("POST", "/v1/apply", {"deployments": [{"name": "m-v2", "model": "m", "version": 2}]}),
    ):
        refused = await verifying(method, where, body, status=409)
        assert "Triton says: no" in refused["error"], where
    (endpoint,) = (await verifying("GET", "/v1/endpoints"))["items"]
    assert [each["deployment"] for each in endpoint["targets"]] == ["m-v1"]

    forced = {"model": "m", "version": 2, "unverified": True}
    await verifying("PUT", "/v1/deployments/m-v2", forced, status=201)
    await verifying("PUT", "/v1/endpoints/other", target, status=201)


async def test_a_version_is_verified_again_when_it_is_registered_again_or_on_demand(verifying):
    await verifying.register("m", onnx_bytes(1))
    await settle(verifying, 1, "rejected", message="no")
    again = await verifying.register("m", onnx_bytes(1))
    assert (again["number"], again["verification"]["state"], again["verification"]["round"]) == (
        1,
        "pending",
        2,
    )
    assert (await settle(verifying, 1, "verified", round_=1))["state"] == "pending", "a late result"
    await settle(verifying, 1, "verified", round_=2, card=CARD)
    again = await verifying.register("m", onnx_bytes(1))
    assert again["verification"]["state"] == "verified"

    started = await verifying("POST", path(1), {"samples": [{"inputs": []}]}, status=202)
    assert (started["state"], started["round"], started["card"]["memory_mb"]) == ("pending", 3, 180)
    assert (await verifying("GET", f"{path(1)}/task"))["task"]["samples"] == [{"inputs": []}]


async def test_without_verification_versions_are_unchecked_and_serve(call):
    made = await call.register("m", onnx_bytes(1))
    assert made["verification"]["state"] == "unchecked"
    await call("POST", "/v1/deploy", {"model": "m"})
    refused = await call("POST", path(1), status=409)
    assert "TIDEGATE_VERIFICATION=on" in refused["error"]
