"""Messages about changes in a real registry: each change makes one message, also over restarts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from standardwebhooks import Webhook

from services.registry.adapters.sql import migrate
from services.registry.settings import RegistrySettings
from services.router.adapters.alert_file import AlertFile
from services.router.adapters.mail_sender import MailSender
from services.router.adapters.registry_cache import RegistryCache
from services.router.adapters.webhook_sender import WebhookSender
from services.router.application import change_feed
from services.router.application.alert_sender import AlertSender
from services.router.application.change_feed import ChangeFeed
from services.router.domain.alerts.notifications import Receiver
from services.router.domain.webhooks import RetryPolicy, secret_of
from tests.integration.registry.conftest import NO_BROKER, TOKEN, serving
from tests.integration.registry.onnx_files import onnx_bytes

pytestmark = pytest.mark.integration

MASTER = b"m" * 32


@pytest.fixture
async def settings(tmp_path: Path) -> RegistrySettings:
    """The settings of a registry with an empty database."""
    url = f"sqlite+aiosqlite:///{tmp_path}/registry.db"
    await migrate.migrate(url)
    return RegistrySettings(
        state_dir=tmp_path, service_token=TOKEN, database_url=url, amqp_url=NO_BROKER, verification="off"
    )


class Parts:
    """The parts of a router that report changes. ``leads``: whether this router leads."""

    def __init__(self, url: str, tmp_path: Path) -> None:
        self.leads = True
        self.cache = RegistryCache(url, TOKEN, tmp_path / "intention.json")
        self.file = AlertFile(tmp_path / "alerts.db")
        self.feed = ChangeFeed(self.cache, self.file, "from@x", lambda: self.leads)
        http = WebhookSender(allow_private=True, timeout_s=2.0, max_in_flight=4)
        mail = MailSender("", "from@x", 1.0)
        retries = RetryPolicy(0.02, 0.1, 3600.0)
        self.sender = AlertSender(self.file, http, mail, MASTER, retries, lambda: self.leads)
        self.feed.on_messages = self.sender.wake

    def titles(self) -> list[str]:
        """Return the titles of all messages, oldest first."""
        return [each.title for each in reversed(self.file.messages(100))]


@pytest.fixture
def running(tmp_path: Path, monkeypatch) -> Callable[..., Any]:
    """Run the parts of a router on one state folder: ``async with running(registry) as parts``."""
    monkeypatch.setattr(change_feed, "POLL_S", 0.02)

    @asynccontextmanager
    async def run(registry: httpx.AsyncClient) -> AsyncIterator[Parts]:
        parts = Parts(str(registry.base_url), tmp_path)
        await parts.cache.refresh()
        parts.feed.start()
        parts.sender.start()
        yield parts
        await parts.feed.stop()
        await parts.sender.stop()
        parts.file.close()
        await parts.cache.close()

    return run


async def register(registry: httpx.AsyncClient, model: str, number: int = 1) -> None:
    artifact = (await registry.put("/v1/artifacts", content=onnx_bytes(number))).json()["sha256"]
    body = {"artifact": artifact, "filename": "model.onnx"}
    (await registry.post(f"/v1/models/{model}/versions", json=body)).raise_for_status()


async def move_alias(registry: httpx.AsyncClient, alias: str) -> None:
    path = f"/v1/models/digits/aliases/{alias}"
    (await registry.put(path, json={"version": 1})).raise_for_status()


async def test_each_change_is_reported_once_over_restarts(settings, running, receiver, until):
    async with serving(settings) as registry:
        await register(registry, "before")
    async with serving(settings) as registry, running(registry) as parts:
        await until(lambda: parts.file.position())
        parts.file.save_receiver(Receiver("ci", "webhook", receiver.url, changes=("version", "alias")))
        everything = ("version", "alias", "deployment", "endpoint")
        parts.file.save_receiver(Receiver("team", "slack", receiver.url, "digit*", changes=everything))
        parts.file.save_receiver(Receiver("pager", "webhook", receiver.url))  # of alerts
        assert parts.titles() == [], "the feed begins with the present state"
        receiver.status = 500
        await register(registry, "digits")
        await register(registry, "other")
        (await registry.post("/v1/keys", json={"name": "ann", "scopes": ["infer"]})).raise_for_status()
        await parts.cache.refresh()
        await until(lambda: len(parts.titles()) == 3)
        await until(lambda: len(receiver.got) >= 3)
        await move_alias(registry, "champion")  # not read before the router stops
    receiver.status = 204
    async with serving(settings) as registry:
        await move_alias(registry, "second")
        async with running(registry) as parts:
            await until(lambda: {each.state for each in parts.file.messages(100)} == {"delivered"})
            await until(lambda: len(parts.titles()) == 7)
            await until(lambda: {each.state for each in parts.file.messages(100)} == {"delivered"})
            by_receiver = {
                name: [each.title for each in reversed(parts.file.messages(100)) if each.receiver == name]
                for name in ("ci", "team", "pager")
            }
    titles = [
        "version digits/1 created by service token",
        "version other/1 created by service token",
        "alias digits/champion created by service token",
        "alias digits/second created by service token",
    ]
    assert by_receiver == {"ci": titles, "team": [titles[0], *titles[2:]], "pager": []}
    signed = {
        headers["webhook-id"]: (headers, body) for headers, body in receiver.got if "webhook-id" in headers
    }
    assert len(signed) == 4, "a second attempt has the id of the first"
    found = [Webhook(secret_of(MASTER, "alerts")).verify(body, headers) for headers, body in signed.values()]
    created = next(each for each in found if each["data"]["name"] == "digits/1")
    assert created["type"] == "version.created"
    assert created["data"]["after"]["format"] == "onnx"
    assert created["timestamp"] == created["data"]["at"]
    chats = [orjson.loads(body) for headers, body in receiver.got if "webhook-id" not in headers]
    assert {"text": titles[0]} in chats


async def test_a_restored_registry_does_not_stop_the_feed(settings, running, receiver, until):
    async with serving(settings) as registry, running(registry) as parts:
        parts.file.save_receiver(Receiver("ci", "webhook", receiver.url, changes=("version",)))
        await parts.cache.refresh()
        await until(lambda: parts.file.position() == 0)
        parts.file.add_messages([], 1_000)  # before the restore, the log was longer
        await register(registry, "digits")
        await parts.cache.refresh()
        await until(lambda: parts.file.position() == 1)
        await register(registry, "digits", 2)
        await parts.cache.refresh()
        await until(lambda: parts.titles() == ["version digits/2 created by service token"])


async def test_two_leaders_make_the_same_messages(settings, running, receiver, until):
    """A router may not know yet that another one leads."""
    async with serving(settings) as registry, running(registry) as parts:
        parts.file.save_receiver(Receiver("ci", "webhook", receiver.url, changes=("version",)))
        await parts.cache.refresh()
        await until(lambda: parts.file.position() == 0)
        late = Parts(str(registry.base_url), parts.cache._disk.parent)
        for number in (1, 2, 3):
            await register(registry, "digits", number)
        entries = await late.cache.changes_after(0, 2)
        await parts.cache.refresh()
        await until(lambda: parts.file.position() == 3)
        assert late.feed._store(entries, 0.0)
        assert parts.file.position() == 3, "it does not go back"
        assert len(parts.titles()) == 3
        await late.sender.stop()
        late.file.close()
        await late.cache.close()


async def test_only_the_leader_reports(settings, running, receiver, until):
    async with serving(settings) as registry, running(registry) as parts:
        parts.file.save_receiver(Receiver("ci", "webhook", receiver.url, changes=("version",)))
        await parts.cache.refresh()
        await until(lambda: parts.file.position() == 0)
        parts.leads = False
        await register(registry, "digits")
        await parts.cache.refresh()
        another = Parts(str(registry.base_url), parts.cache._disk.parent)
        await another.cache.refresh()
        another.feed.start()
        await until(lambda: len(another.titles()) == 1)
        parts.leads = True
        await register(registry, "digits", 2)
        await another.feed.stop()
        await parts.cache.refresh()
        await until(lambda: len(parts.titles()) == 2)
        await another.sender.stop()
        another.file.close()
        await another.cache.close()
