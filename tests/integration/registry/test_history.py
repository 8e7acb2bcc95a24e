"""The audit log, and usage from the broker into the database."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import date

from sqlalchemy.exc import OperationalError

from services.registry.adapters import usage_intake
from services.registry.adapters.sql import usage
from tests.conftest import PATIENCE_S
from tests.integration.registry.onnx_files import onnx_bytes
from tidegate.kernel.broker.connection import Channel, Connection
from tidegate.kernel.broker.topology import USAGE
from tidegate.kernel.protocol.access import Principal
from tidegate.kernel.protocol.usage import Subject, UsageReport

DAY = date(2026, 1, 2)


async def audit(call, **query):
    return (await call("GET", "/v1/audit", params=query))["items"]


async def test_every_change_has_an_audit_entry(call):
    olga = Principal("k1", "olga", frozenset({"publish"}))
    headers = {
        "X-Tidegate-Principal": olga.to_header(),
        "X-Tidegate-Origin": "192.0.2.7",
        "X-Request-Id": "r-1",
    }
    await call.register("digits", onnx_bytes())
    await call("POST", "/v1/deploy", {"model": "digits"}, headers=headers)
    await call("PATCH", "/v1/deployments/digits-v1", {"max_replicas": 3, "env": {"TOKEN": "s3cret"}})
    await call("PATCH", "/v1/deployments/digits-v1", {"env": {"TOKEN": "an0ther"}})
    await call("PUT", "/v1/deployments/digits-v1", {"model": "digits", "version": 9}, status=409)
    await call("DELETE", "/v1/models/digits?cascade=true")

    found = await audit(call)
    assert [(e["kind"], e["name"], e["action"]) for e in reversed(found)] == [
        ("version", "digits/1", "created"),
        ("deployment", "digits-v1", "created"),
        ("endpoint", "digits", "created"),
        ("deployment", "digits-v1", "updated"),
        ("deployment", "digits-v1", "updated"),
        ("endpoint", "digits", "deleted"),
        ("deployment", "digits-v1", "deleted"),
        ("version", "digits/1", "deleted"),
    ]
    assert {e["principal"] for e in found} == {"service", "k1"}
    by_olga = await audit(call, principal="k1")
    assert len(by_olga) == 2
    assert by_olga[0]["principal_name"] == "olga"
    assert (by_olga[0]["origin"], by_olga[0]["request_id"]) == ("192.0.2.7", "r-1")
    assert by_olga[0]["before"] is None
    assert by_olga[0]["after"]["targets"] == [{"deployment": "digits-v1", "weight": 100}]

    second, first = (await audit(call, kind="deployment", name="digits-v1"))[1:3]
    assert (first["before"]["max_replicas"], first["after"]["max_replicas"]) == (1, 3)
    assert first["after"]["env"] == {"TOKEN": "(hidden)"}
    assert second["after"]["env"] == {"TOKEN": "(hidden, changed)"}
    assert found[0]["after"] is None


async def test_an_override_and_a_settled_roll_over_are_changes(call):
    await call.register("digits", onnx_bytes())
    await call("POST", "/v1/deploy", {"model": "digits"})
    await call("PUT", "/v1/deployments/digits-v1/override", {"replicas": 4})
    newest = (await audit(call, limit=1))[0]
    assert (newest["before"]["override"], newest["after"]["override"]["replicas"]) == (None, 4)


async def test_keys_in_the_log_are_without_their_secrets(call):
    made = await call("POST", "/v1/keys", {"name": "a", "rate": 2})
    await call("POST", f"/v1/keys/{made['id']}/rotate")
    await call("DELETE", f"/v1/keys/{made['id']}")
    found = await audit(call, kind="key", name=made["id"])
    assert [e["action"] for e in found] == ["deleted", "updated", "created"]
    assert found[2]["after"]["rate"] == 2
    assert found[1]["before"]["secret"] != found[1]["after"]["secret"]
    assert made["key"] not in str(found)


async def test_pages_continue_with_older_entries(call):
    for number in range(5):
        await call("POST", "/v1/keys", {"name": f"k{number}"})
    first = await call("GET", "/v1/audit?limit=3")
    rest = await call("GET", f"/v1/audit?limit=3&before={first['next']}")
    assert [e["after"]["name"] for e in first["items"] + rest["items"]] == ["k4", "k3", "k2", "k1", "k0"]
    assert rest["next"] is None


async def test_pages_continue_with_newer_entries(call):
    for number in range(5):
        await call("POST", "/v1/keys", {"name": f"k{number}"})
    first = await call("GET", "/v1/audit?limit=3&after=0")
    rest = await call("GET", f"/v1/audit?limit=3&after={first['next']}")
    assert [e["after"]["name"] for e in first["items"] + rest["items"]] == ["k0", "k1", "k2", "k3", "k4"]
    assert rest["next"] is None
    assert (await call("GET", f"/v1/audit?after={rest['items'][-1]['id']}"))["items"] == []


async def test_the_quota_of_a_caller_whose_name_has_a_slash(call):
    found = await call("GET", "/v1/usage/quota?principal=spiffe://x/y&day=2026-01-02")
    assert found == {"day": 0, "month": 0}


def report(seq: int, *, requests: int = 2, endpoint: str = "digits", day: date = DAY) -> bytes:
    counts = (requests, 1, 1500, 10, 20, 3, 4)
    return UsageReport("beef", seq, {Subject(day, "k1", endpoint): counts}).to_json()


@asynccontextmanager
async def reporting(url: str) -> AsyncIterator[Channel]:
    """Open a channel that reports usage like a gateway."""

    async def declare(channel: Channel) -> None:
        await channel.declare(USAGE)

    async with Connection(url, "test", declare) as connection:
        channel = await connection.wait_up(PATIENCE_S)
        # A gateway of an earlier test may have left a report.
        await channel.delete(USAGE)
        await channel.declare(USAGE)
        yield channel


async def test_usage_is_added_once_and_summed(opened, rabbitmq_url, until):
    async with reporting(rabbitmq_url) as channel, opened(amqp_url=rabbitmq_url) as call:
        next_day = date(2026, 1, 3)
        for body in (report(1), report(1), b"no report", report(2, requests=3), report(3, day=next_day)):
            await channel.publish(body, routing_key=USAGE.name, persistent=True)
        await channel.publish(report(4, endpoint="=cmd"), routing_key=USAGE.name, persistent=True)

        async def rows(query: str = ""):
            return (await call("GET", f"/v1/usage{query}"))["items"]

        await until(lambda: _has(rows, 3))
        first = (await rows())[1]
        assert first == {
            "day": "2026-01-02",
            "principal": "k1",
            "endpoint": "digits",
            "requests": 5,
            "failed": 2,
            "compute_us": 3000,
            "received_bytes": 20,
            "sent_bytes": 40,
            "tokens_in": 6,
            "tokens_out": 8,
            "principal_name": "k1",
        }
        assert [r["requests"] for r in await rows("?by=endpoint")] == [2, 7]
        assert [r["requests"] for r in await rows("?by=")] == [9]
        assert [r["requests"] for r in await rows("?by=day&since=2026-01-03&principal=k1")] == [2]
        assert await rows("?principal=nobody") == []
        assert (await call("GET", "/v1/usage?by=color", status=400))["reason"] == "bad_request"
        assert await call("GET", "/v1/usage/k1/quota?day=2026-01-02") == {"day": 7, "month": 7}
        assert await call("GET", "/v1/usage/k1/quota?day=2026-01-03") == {"day": 2, "month": 9}

        csv = (await call.http.get("/v1/usage.csv?by=day,endpoint")).text.split("\r\n")
        assert csv[0].startswith("day,endpoint,requests,failed,compute_us")
        assert csv[1].startswith("2026-01-02,'=cmd,2,"), "no formula for a spreadsheet"
        assert csv[2] == "2026-01-02,digits,5,2,3000,20,40,6,8"

        async def empty() -> bool:
            return await channel.depth(USAGE) == 0

        await until(empty)


async def _has(rows, count: int) -> bool:
    return len(await rows()) == count


async def test_a_report_that_the_database_refuses_blocks_no_other(
    opened, rabbitmq_url, until, caplog, monkeypatch
):
    monkeypatch.setattr(usage_intake, "PREFETCH", 1)  # the second comes when the first is acked
    too_large = report(1, requests=2**63)
    async with reporting(rabbitmq_url) as channel, opened(amqp_url=rabbitmq_url) as call:
        for body in (too_large, report(2)):
            await channel.publish(body, routing_key=USAGE.name, persistent=True)

        async def rows():
            return (await call("GET", "/v1/usage"))["items"]

        await until(lambda: _has(rows, 1))
        assert [row["requests"] for row in await rows()] == [2]
    (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert (record.seq, record.requests, bool(record.problem)) == (1, 2**63, True)


async def test_a_report_waits_for_a_database_that_is_away(opened, rabbitmq_url, until, monkeypatch):
    add, asked = usage.add, []

    async def away_at_first(*args):
        asked.append(1)
        if len(asked) < 4:
            raise OperationalError("INSERT", {}, OSError("disk I/O error"))
        return await add(*args)

    monkeypatch.setattr(usage_intake, "RETRY_S", 0.01)
    monkeypatch.setattr(usage, "add", away_at_first)
    async with reporting(rabbitmq_url) as channel, opened(amqp_url=rabbitmq_url) as call:
        await channel.publish(report(1), routing_key=USAGE.name, persistent=True)

        async def rows():
            return (await call("GET", "/v1/usage"))["items"]

        await until(lambda: _has(rows, 1))
