"""Alerts over real HTTP and SMTP: each message arrives once, also if the router stops in between."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from email import message_from_bytes
from email.message import Message
from typing import Any

import httpx
import orjson
import pytest
from fastapi import FastAPI
from standardwebhooks import Webhook

from services.router.adapters.alert_file import AlertFile, AlertMessage
from services.router.adapters.endpoint_metrics import EndpointMetrics
from services.router.adapters.mail_sender import MailSender
from services.router.adapters.registry_cache import RegistryCache
from services.router.adapters.watch_file import WatchFile
from services.router.adapters.webhook_sender import WebhookSender
from services.router.app import build
from services.router.application.alert_runner import AlertRunner
from services.router.application.alert_sender import AlertSender
from services.router.application.change_feed import CHANGE_PREFIX
from services.router.application.endpoint_watch import EndpointWatch
from services.router.domain.alerts.alert_rules import BY_NAME
from services.router.domain.alerts.facts import Finding
from services.router.domain.alerts.notifications import Pace, Receiver
from services.router.domain.webhooks import RetryPolicy, secret_of
from services.router.settings import RouterSettings
from tidegate.kernel.protocol.access import PRINCIPAL_HEADER, Principal

pytestmark = pytest.mark.integration

MASTER = b"m" * 32


class SmallMailServer:
    """An SMTP server (RFC 5321) that keeps what it takes. It refuses the first ``refusals`` with 451."""

    def __init__(self) -> None:
        self.got: list[Message] = []
        self.refusals = 0
        self._server: asyncio.Server | None = None

    async def up(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"smtp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def down(self) -> None:
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 small\r\n")
        while line := await reader.readline():
            word = line[:4].upper().strip()
            if word == b"DATA":
                writer.write(b"354 go\r\n")
                body = (await reader.readuntil(b"\r\n.\r\n")).removesuffix(b".\r\n")
                if self.refusals:
                    self.refusals -= 1
                    writer.write(b"451 later\r\n")
                else:
                    self.got.append(message_from_bytes(body.replace(b"\r\n..", b"\r\n.")))
                    writer.write(b"250 taken\r\n")
            elif word == b"QUIT":
                writer.write(b"221 bye\r\n")
                break
            else:
                writer.write(b"250 fine\r\n")
            await writer.drain()
        writer.close()


@pytest.fixture
async def mail() -> AsyncIterator[tuple[SmallMailServer, str]]:
    server = SmallMailServer()
    url = await server.up()
    yield server, url
    await server.down()


class Parts:
    """The alerts of a router, without the rest of it."""

    def __init__(self, tmp_path, store, cache: RegistryCache, mail_url: str) -> None:
        self.findings: list[Finding] = []
        self.watch = EndpointWatch(
            store, cache, lambda: True, WatchFile(tmp_path / "watch.db"), list, every_s=0.02, day_s=86_400
        )
        self.file = AlertFile(tmp_path / "alerts.db")
        rules = [replace(BY_NAME["Drift"], keep_s=0.0)]
        pace = Pace(group_s=0.0)
        self.runner = AlertRunner(self.watch, self.file, EndpointMetrics(), pace, "from@x", rules=rules)
        self.runner.findings.append(lambda: self.findings)
        self.watch.after.append(self.runner.evaluate)
        http = WebhookSender(allow_private=True, timeout_s=2.0, max_in_flight=4)
        sender = MailSender(mail_url, "from@x", 60.0)
        retries = RetryPolicy(0.02, 0.1, 3600.0)
        self.sender = AlertSender(self.file, http, sender, MASTER, retries, lambda: True)
        self.runner.on_messages = self.sender.wake


@pytest.fixture
async def running(registry, store, tmp_path, mail) -> AsyncIterator[Callable[..., Any]]:
    """Run the parts on one state folder: ``async with running(sends=True) as parts``."""
    cache = RegistryCache(registry.url, "token", tmp_path / "intention.json")
    await cache.refresh()

    @asynccontextmanager
    async def run(sends: bool = True) -> AsyncIterator[Parts]:
        parts = Parts(tmp_path, store, cache, mail[1])
        parts.watch.start()
        if sends:
            parts.sender.start()
        yield parts
        await parts.watch.stop()
        if sends:
            await parts.sender.stop()
        parts.file.close()

    yield run
    await cache.close()


async def test_each_message_arrives_once_over_a_restart(running, registry, receiver, mail, until):
    server, _ = mail
    finding = Finding("Drift", registry.name, "age", 0.3, 0.1, "the feature age drifts")
    receiver.status, server.refusals = 500, 2
    async with running(sends=False) as parts:
        parts.file.save_receiver(Receiver("hook", "webhook", receiver.url))
        parts.file.save_receiver(Receiver("chat", "slack", receiver.url))
        parts.file.save_receiver(Receiver("mail", "email", "ops@example.com"))
        parts.file.save_receiver(Receiver("pager", "webhook", receiver.url, severity="critical"))
        parts.findings.append(finding)
        await until(lambda: len(parts.file.messages(9)) == 3)
    # The router stopped before it sent them. The next one does, and its receivers refuse them at first.
    async with running() as parts:
        parts.findings.append(finding)
        await until(lambda: len(receiver.got) >= 4 and server.got)
        receiver.status = 204
        await until(lambda: {each.state for each in parts.file.messages(9)} == {"delivered"})
        await asyncio.sleep(0.2)  # ten more evaluations
        assert len(parts.file.messages(9)) == 3
        assert [each.state for each in parts.file.events(None, 9)] == ["firing"]
        parts.findings.clear()
        await until(lambda: len(parts.file.messages(9)) == 6)
        await until(lambda: {each.state for each in parts.file.messages(9)} == {"delivered"})
        assert [each.state for each in parts.file.events(None, 9)] == ["resolved", "firing"]
    assert [each["Subject"] for each in server.got] == [
        f"[Tidegate] {state} {registry.name}: Drift" for state in ("FIRING", "RESOLVED")
    ]
    hooks = [(headers, body) for headers, body in receiver.got if "webhook-signature" in headers]
    assert len({headers["webhook-id"] for headers, _ in hooks}) == 2
    verified = Webhook(secret_of(MASTER, "alerts")).verify(hooks[-1][1], hooks[-1][0])
    assert (verified["type"], verified["data"]["endpoint"]) == ("alert.resolved", registry.name)
    chats = [orjson.loads(body) for headers, body in receiver.got if "webhook-signature" not in headers]
    assert chats[-1]["text"] == f"RESOLVED {registry.name}: Drift"


async def test_a_receiver_that_does_not_answer_delays_no_other(tmp_path, receiver, mail, until):
    file = AlertFile(tmp_path / "alerts.db")
    http = WebhookSender(allow_private=True, timeout_s=300.0, max_in_flight=8)
    retries = RetryPolicy(0.02, 0.1, 3600.0)
    sender = AlertSender(file, http, MailSender(mail[1], "from@x", 60.0), MASTER, retries, lambda: True)
    connections: list[asyncio.StreamWriter] = []
    silent = await asyncio.start_server(lambda reader, writer: connections.append(writer), "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    file.save_receiver(Receiver("silent", "webhook", f"http://127.0.0.1:{port}/"))
    file.save_receiver(Receiver("hook", "webhook", receiver.url))
    now = time.time()
    messages = [AlertMessage(f"a{n}", "silent", "m", "t", now, now - 60, b"{}") for n in range(50)]
    file.commit([], [], [*messages, AlertMessage("b", "hook", "m", "t", now, now, b"{}")], now)
    sender.start()
    await until(lambda: receiver.got)
    assert len(connections) <= 2
    await sender.stop()
    file.close()
    for each in connections:
        each.close()
    silent.close()


async def test_messages_wait_no_longer_if_their_receiver_gets_something_else(tmp_path):
    file = AlertFile(tmp_path / "alerts.db")
    changes = Receiver("ci", "webhook", "https://ci.example.com/", changes=("version",))
    now = time.time()

    def waiting() -> int:
        file.add_messages([AlertMessage("a", "ci", "m/1", "t", now, now, b"{}")], 1)
        return len(file.due("ci", now, 9))

    file.save_receiver(changes)
    assert waiting() == 1
    file.save_receiver(replace(changes, to="https://new.example.com/"))
    assert len(file.due("ci", now, 9)) == 1, "only the address is another"
    file.save_receiver(replace(changes, kind="slack"))
    assert file.due("ci", now, 9) == []
    assert waiting() == 1
    file.save_receiver(replace(changes, kind="slack", changes=()))
    assert file.due("ci", now, 9) == []
    file.close()


@asynccontextmanager
async def router_of(settings: RouterSettings) -> AsyncIterator[tuple[FastAPI, httpx.AsyncClient]]:
    """Run a whole router in the block. Yield it, and a client with the service token."""
    app = build(settings)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app),
            base_url="http://127.0.0.1",
            headers={"Authorization": "Bearer token"},
        ) as client,
    ):
        yield app, client


async def test_the_routes(registry, store, rabbitmq_url, valkey_url, jobs_url, tmp_path, receiver, until):
    settings = RouterSettings(
        state_dir=tmp_path, service_token="token", redis_url=valkey_url, jobs_url=jobs_url,
        amqp_url=rabbitmq_url, registry_url=registry.url, watch_interval_s=0.05,
    )  # fmt: skip
    async with router_of(settings) as (app, client):

        async def ready() -> bool:
            return (await client.get("/v1/top")).status_code == 200

        await until(ready)
        assert (await client.get("/v1/alerts")).json() == {"items": []}
        (state,) = (await client.get("/v1/diagnosis?window_s=10&past_s=60")).json()["endpoints"]
        assert (state["endpoint"], state["state"]) == (registry.name, "learning")
        assert (await client.get("/v1/diagnosis?name=none")).status_code == 404
        url = "/v1/alerts/receivers/ops"
        wrong = await client.put(url, json={"kind": "webhook", "to": "ftp://x"})
        assert (wrong.status_code, "must be a URL" in wrong.json()["error"]) == (400, True)
        no_mail = await client.put(url, json={"kind": "email", "to": "a@b"})
        assert "tidegate settings set TIDEGATE_SMTP_URL" in no_mail.json()["error"]
        made = await client.put(url, json={"kind": "webhook", "to": receiver.url})
        assert made.json()["to"].endswith("/...")
        (tried,) = (await client.post("/v1/alerts/test")).json()["items"]
        assert (tried["delivered"], tried["status"]) == (True, 204)
        changes = {"kind": "webhook", "to": receiver.url, "changes": ["version"]}
        operator = {PRINCIPAL_HEADER.decode(): Principal("op", "op", frozenset({"operate"})).to_header()}
        assert (
            await client.put("/v1/alerts/receivers/ci", json=changes, headers=operator)
        ).status_code == 403
        assert (await client.put("/v1/alerts/receivers/ci", json=changes)).json()["changes"] == ["version"]
        (tried,) = (await client.post("/v1/alerts/test?receiver=ci")).json()["items"]
        assert (tried["delivered"], orjson.loads(receiver.got[-1][1])["type"]) == (True, "version.created")
        wrong = await client.put("/v1/alerts/receivers/ci", json=changes | {"changes": ["key"]})
        assert wrong.status_code == 400
        # It would get the messages that wait for the receiver of the admin.
        taken = await client.put("/v1/alerts/receivers/ci", json={**changes, "changes": []}, headers=operator)
        assert taken.status_code == 403
        assert (await client.delete("/v1/alerts/receivers/ci", headers=operator)).status_code == 403
        now = time.time()
        app.state.alerts.file.add_messages(
            [
                AlertMessage(
                    f"{CHANGE_PREFIX}1", "ci", "m/1", "version m/1 created by ann", now, now + 900, b"{}"
                )
            ],
            1,
        )
        url_of_messages = "/v1/alerts/messages"
        assert len((await client.get(url_of_messages)).json()["items"]) == 1
        assert (await client.get(url_of_messages, headers=operator)).json()["items"] == []
        assert (await client.delete("/v1/alerts/receivers/ci")).status_code == 204
        receiver.status = 500
        (tried,) = (await client.post("/v1/alerts/test?receiver=ops")).json()["items"]
        assert (tried["delivered"], tried["status"]) == (False, 500)
        body = {"endpoint": registry.name, "for_s": 3600, "why": "a test"}
        silence = (await client.post("/v1/alerts/silences", json=body)).json()
        assert silence["until"] > time.time()
        assert len((await client.get("/v1/alerts/silences")).json()["items"]) == 1
        assert (await client.delete(f"/v1/alerts/silences/{silence['id']}")).status_code == 204
        assert (await client.delete(f"/v1/alerts/silences/{silence['id']}")).status_code == 404
        assert (await client.delete(url)).status_code == 204
        assert "TidegateErrorRate" in (await client.get("/v1/alerts/prometheus")).text
        assert len((await client.get("/v1/alerts/rules")).json()["items"]) == 12
        page = (await client.get("/metrics")).text
        assert f'tidegate_endpoint_alert_limit{{endpoint="{registry.name}",rule="ErrorRate"}} 5.0' in page


async def test_receivers_can_be_set_before_the_traffic_is_read(
    store, rabbitmq_url, valkey_url, jobs_url, tmp_path, receiver, until
):
    """Without a registry, the router leads but does not know the endpoints yet, so it reads no traffic."""
    settings = RouterSettings(
        state_dir=tmp_path, service_token="token", redis_url=valkey_url, jobs_url=jobs_url,
        amqp_url=rabbitmq_url, registry_url="http://127.0.0.1:9",
    )  # fmt: skip
    async with router_of(settings) as (_, client):

        async def stored() -> bool:
            body = {"kind": "webhook", "to": receiver.url}
            return (await client.put("/v1/alerts/receivers/ops", json=body)).status_code == 200

        await until(stored)
        assert (await client.get("/v1/alerts")).status_code == 503
        assert len((await client.get("/v1/alerts/receivers")).json()["items"]) == 1
