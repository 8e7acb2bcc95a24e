"""Test the operations of a running autoscaler: why, policies, pauses, hosts, replays of recordings."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import httpx
import pytest

from services.autoscaler.application.control_loop import ControlLoop
from tests.conftest import PATIENCE_S
from tests.integration.autoscaler.test_service import NAME, Bench, bench

__all__ = ["bench"]

PATH = f"/v1/deployments/{NAME}"


async def settled(bench: Bench, client: httpx.AsyncClient, count: int) -> dict[str, Any]:
    """Wait for so many ready replicas and their measured start times, and return the status."""
    await bench.until_ready(client, count)
    async with asyncio.timeout(PATIENCE_S):
        while (status := await bench.status(client))["start_s"] is None:
            await asyncio.sleep(0.02)
    return status


async def test_why_and_the_policy(bench: Bench) -> None:
    async with bench.registry.serving(), bench.autoscaler() as client:
        bench.outstanding = 40
        status = await settled(bench, client, 3)
        assert status["limits"] == [1, 3]
        assert status["rule"] == "maximum"
        assert status["start_s"] > 0
        document = (await client.get(f"{PATH}/why")).json()
        assert (document["desired"], document["rule"]) == (3, "maximum")
        assert (
            "40 requests and jobs at 20 ms each: 4 replicas are needed; the maximum is 3"
            in document["reason"]
        )
        assert {need["rule"]: need["replicas"] for need in document["needs"]}["wait"] == 4
        assert document["signals"]["demand"] == 40
        assert document["replicas"] == {"ready": 3, "starting": 0, "draining": 0}
        assert document["decisions"][0]["inputs"]["needs"]["wait"] == 4

        change = {"max_replicas": 2, "scaling": {"aggressiveness": "latency", "price_per_hour": 1.5}}
        changed = (await client.patch(f"{PATH}/policy", json=change)).json()
        assert changed["given"]["scaling"] == {"aggressiveness": "latency", "price_per_hour": 1.5}
        assert changed["effective"]["utilization"] == 0.6
        assert (await settled(bench, client, 2))["cost_per_hour"] == 3.0
        assert (await client.get(f"{PATH}/policy")).json()["bounds"]["high"] == 2
        wrong = await client.patch(f"{PATH}/policy", json={"scaling": {"aggressiveness": "brave"}})
        assert wrong.status_code == 400
        assert "aggressiveness" in wrong.json()["error"]
        assert (await client.patch(f"{PATH}/policy", json={"threads": 3})).status_code == 400
        assert (await client.get("/v1/deployments/nothing/why")).status_code == 404


async def test_pause_and_resume_without_the_registry(bench: Bench) -> None:
    bench.outstanding = 40
    async with bench.registry.serving(), bench.autoscaler() as client:
        await bench.until_ready(client, 3)
    async with bench.autoscaler() as client:
        await bench.until_ready(client, 3)
        held = (await client.post(f"{PATH}/pause", json={"hold": True, "ttl_s": 600})).json()
        assert held.items() >= {"deployment": NAME, "replicas": 3, "held_by": "autoscaler"}.items()
        assert held["bounded_by"] is None
        bench.outstanding = 0
        await asyncio.sleep(1.5)
        assert (await bench.status(client))["ready"] == 3, "held regardless of demand"
        assert "an operator set the replicas to 3" in (await client.get(f"{PATH}/why")).json()["holds"][0]
        await client.post(f"{PATH}/pause", json={})
        await bench.until_ready(client, 0)
        assert (await bench.status(client))["conditions"][0]["reason"] == "Paused"
        await client.post(f"{PATH}/resume")
        await bench.until_ready(client, 1)


async def test_a_cordoned_host_starts_nothing_also_after_a_restart(bench: Bench) -> None:
    bench.settings.autoscaler_host_name = "machine"
    async with bench.registry.serving():
        async with bench.autoscaler() as client:
            names = await bench.until_ready(client, 1)
            answer = await client.put("/v1/hosts/machine/cordon", json={"drain": True})
            assert answer.json() == {"host": "machine", "cordoned": True, "drained": names}
            await bench.until_ready(client, 0)
            unknown = await client.put("/v1/hosts/elsewhere/cordon", json={})
            assert unknown.status_code == 404
        async with bench.autoscaler() as client:
            await bench.until_ready(client, 0)
            async with asyncio.timeout(PATIENCE_S):
                while not await bench.well(client):
                    await asyncio.sleep(0.05)
            await asyncio.sleep(0.5)
            status = await bench.status(client)
            assert status["desired"] == 1
            assert any(c["reason"] == "Cordoned" for c in status["conditions"])
            (host,) = (await client.get("/v1/hosts")).json()["items"]
            assert host["cordoned_at"] is not None
            assert (await client.delete("/v1/hosts/machine/cordon")).status_code == 200
            await bench.until_ready(client, 1)
            assert (await client.delete("/v1/hosts/machine/cordon")).status_code == 404


async def test_draining_a_host_ends_nothing_of_another_and_passes_over_who_is_gone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.settings.autoscaler_host_name = "former"
    async with bench.registry.serving():
        async with bench.autoscaler() as client:
            await bench.until_ready(client, 1)
            await client.put("/v1/hosts/former/cordon", json={})
        bench.settings.autoscaler_host_name = "machine"
        bench.outstanding = 40
        async with bench.autoscaler() as client:
            names = await bench.until_ready(client, 3)
            since = {h["host"]: h["cordoned_at"] for h in (await client.get("/v1/hosts")).json()["items"]}
            answer = await client.put("/v1/hosts/former/cordon", json={"drain": True})
            assert answer.json() == {"host": "former", "cordoned": True, "drained": []}
            assert await bench.until_ready(client, 3) == names
            again = {h["host"]: h["cordoned_at"] for h in (await client.get("/v1/hosts")).json()["items"]}
            assert again == since
            drain = ControlLoop.drain

            async def all_but_the_first(loop: ControlLoop, replica: str) -> None:
                await drain(loop, "gone-v1-0-1" if replica == names[0] else replica)

            monkeypatch.setattr(ControlLoop, "drain", all_but_the_first)
            answer = await client.put("/v1/hosts/machine/cordon", json={"drain": True})
            assert answer.json()["drained"] == names[1:]


async def test_cold_starts_are_reported(bench: Bench) -> None:
    async with bench.registry.serving(), bench.autoscaler() as client:
        await bench.until_ready(client, 1)
        (found,) = (await client.get("/v1/cold-starts")).json()["items"]
        assert (found["deployment"], found["count"]) == (NAME, 1)
        assert found["phases_ms"] == {"launch": 10.0, "load": 20.0}
        assert found["median_ms"] == found["longest_ms"] > 0


async def test_what_was_decided_live_is_decided_again(bench: Bench) -> None:
    """Across a restart, a death and scaling up and down, every decision is the same again."""
    async with bench.registry.serving():
        async with bench.autoscaler() as client:
            await bench.until_ready(client, 1)
            bench.outstanding = 40
            await bench.until_ready(client, 3)
        async with bench.autoscaler() as client:
            await bench.until_ready(client, 3)
            bench.outstanding = 0
            await bench.until_ready(client, 1)

            async def verified() -> dict[str, Any]:
                answer = await client.post("/v1/replay/verify", json={"deployment": NAME})
                found: dict[str, Any] = answer.json()
                return found

            async with asyncio.timeout(PATIENCE_S):  # a slow machine has made fewer rounds so far
                while (await verified())["rounds"] <= 10:
                    await asyncio.sleep(0.05)
            live = (await client.get("/v1/decisions", params={"deployment": NAME})).json()["items"]
            found = await verified()
            assert found["differences"] == 0, found["different"]
            assert found["decisions"] == found["reproduced"] == len(live) >= 3
            assert found["rounds"] > 10
            nothing = (await client.post("/v1/replay/verify", json={"until": 1.0})).json()
            assert nothing["rounds"] == 0


async def test_a_replay_of_what_came_and_of_what_could_come(bench: Bench) -> None:
    async with bench.registry.serving(), bench.autoscaler() as client:
        await bench.until_ready(client, 1)
        for _ in range(20):
            bench.arrived += 5
            await asyncio.sleep(0.1)
        order: dict[str, Any] = {
            "deployment": NAME,
            "arrivals": {"kind": "recorded", "seconds": 60},
            "policies": [{"name": "one", "changes": {"max_replicas": 1}}],
            "others": ["keda", "knative"],
            "service": {"call_ms": 50.0, "start_s": 2.0},
            "picture": True,
        }
        answer = await client.post("/v1/replay", json=order, timeout=120)
        found = answer.json()
        assert answer.status_code == 200, found
        assert [result["name"] for result in found["results"]] == ["live", "one", "keda", "knative"]
        assert 0 < found["requests"] <= 100
        assert all(result["requests"] == found["requests"] for result in found["results"])
        assert base64.b64decode(found["picture"]).startswith(b"\x89PNG")
        spike = {
            **order,
            "arrivals": {"kind": "synthetic", "shape": "spike", "seconds": 120},
            "picture": False,
        }
        found = (await client.post("/v1/replay", json=spike, timeout=120)).json()
        assert found["requests"] > 1000
        assert found["service"]["call_ms"] == 50.0
        file = {**spike, "arrivals": {"kind": "csv", "text": "0\n1\n1.5\n"}}
        assert (await client.post("/v1/replay", json=file, timeout=120)).json()["requests"] == 3
        wrong = {
            **spike,
            "policies": [{"name": "x", "changes": {"scaling": {"schedule": [{"start": "now"}]}}}],
        }
        refused = await client.post("/v1/replay", json=wrong, timeout=120)
        assert refused.status_code == 400
        assert "Policy 'x': scaling.schedule.0" in refused.json()["error"]
        early = {**order, "arrivals": {"kind": "recorded", "since": 1.0, "until": 2.0}}
        assert "No arrival" in (await client.post("/v1/replay", json=early, timeout=120)).json()["error"]


async def test_every_call_is_in_the_openapi_document(bench: Bench) -> None:
    async with bench.autoscaler() as client:
        document = (await client.get("/openapi.json")).json()
        calls = {f"{method.upper()} {path}" for path, found in document["paths"].items() for method in found}
        assert calls >= {
            "GET /v1/deployments",
            "GET /v1/deployments/{name}/why",
            "GET /v1/deployments/{name}/policy",
            "PATCH /v1/deployments/{name}/policy",
            "PUT /v1/deployments/{name}/replicas",
            "POST /v1/deployments/{name}/pause",
            "POST /v1/deployments/{name}/resume",
            "POST /v1/replicas/{replica}/drain",
            "PUT /v1/hosts/{host}/cordon",
            "DELETE /v1/hosts/{host}/cordon",
            "GET /v1/hosts",
            "GET /v1/cold-starts",
            "GET /v1/decisions",
            "POST /v1/replay",
            "POST /v1/replay/verify",
        }
        undescribed = [
            path
            for path, found in document["paths"].items()
            if path.startswith("/v1") and not all(call.get("description") for call in found.values())
        ]
        assert not undescribed
        change = document["components"]["schemas"]["PolicyChange"]["properties"]["scaling"]
        assert "aggressiveness" in str(change)
