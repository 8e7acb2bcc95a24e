"""Dead letters with their payloads: kept, shown to operators, replayed as jobs, and swept."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from services.router.app import build
from services.router.domain.exceptions import EXHAUSTED, NOT_RETRIED, UNDECODABLE
from services.router.settings import RouterSettings
from tests.conftest import PATIENCE_S
from tidegate.kernel.blobs.claims import Claims
from tidegate.kernel.blobs.store import Blobs
from tidegate.kernel.broker.connection import Connection
from tidegate.kernel.broker.topology import EXCEPTIONS, jobs_queue
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.access import INFER, OPERATE, PRINCIPAL_HEADER, PUBLISH, Principal
from tidegate.kernel.protocol.jobs import Finish, Take
from tidegate.kernel.store import JobStore
from tidegate.stack.ports import free_ports

pytestmark = pytest.mark.integration

CLAIM_ABOVE = 1000
DATA = [b"first tensor", b"second"]


class Router:
    """A complete router: publish to its exceptions queue, and call its HTTP API."""

    def __init__(self, client: httpx.AsyncClient, connection: Connection, claims: Claims, app: Any) -> None:
        self.client = client
        self.claims = claims
        self.app = app
        self._connection = connection

    async def give_up(self, *frames: bytes, queue: str, cause: str = EXHAUSTED, body: bytes = b"") -> None:
        channel = await self._connection.wait_up(PATIENCE_S)
        await channel.publish(
            body or envelope.pack(envelope.REQUESTS, list(frames)),
            routing_key=EXCEPTIONS.name,
            headers={"cause": cause, "queue": queue},
            persistent=True,
            mandatory=True,
        )

    async def letters(self, **query: str) -> list[dict[str, Any]]:
        """Return the letters, newest first."""
        found: list[dict[str, Any]] = (await self.client.get("/v1/dead", params=query)).json()["items"]
        return found


@pytest.fixture
async def router(
    rabbitmq_url, jobs_url, valkey_url, registry, store, tmp_path, until
) -> AsyncIterator[Router]:
    settings = RouterSettings(
        state_dir=tmp_path,
        service_token="token",
        router_port=free_ports(1)[0],
        amqp_url=rabbitmq_url,
        redis_url=valkey_url,
        jobs_url=jobs_url,
        registry_url=registry.url,
        claim_above_bytes=CLAIM_ABOVE,
        dead_letter_bytes=20_000,
        dead_letters_kept=5,
    )
    app = build(settings)
    blobs = Blobs(settings.blob_url)
    async with (
        Connection(rabbitmq_url, "giving up", lambda channel: channel.declare(EXCEPTIONS)) as connection,
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app),
            base_url="http://127.0.0.1",
            headers={"Authorization": "Bearer token"},
        ) as client,
    ):

        async def leads() -> bool:
            return (await client.get("/v1/dead")).status_code == 200

        await until(leads, "the lease of the router of an earlier test has ended")
        yield Router(client, connection, Claims(blobs, CLAIM_ABOVE), app)
    blobs.close()


def frame(data: list[Any] = DATA, **given: Any) -> bytes:
    deadline_ms = int(time.time() * 1e3) + 30_000
    return envelope.request_frame(os.urandom(16), deadline_ms, 1, b"key", data, tenant=b"acme", **given)


def as_principal(*scopes: str) -> dict[str, str]:
    return {PRINCIPAL_HEADER.decode(): Principal("op", "op", frozenset(scopes)).to_header()}


async def one(router: Router, until, **query: str) -> dict[str, Any]:
    async def there() -> Any:
        return await router.letters(**query)

    (letter,) = await until(there)
    return letter


async def test_the_payload_is_kept(router, until):
    """The whole request, byte for byte, for callers with the scope operate."""
    asked = frame(attempt=3)
    await router.give_up(asked, queue="requests.v1.d")
    letter = await one(router, until)
    assert (letter["tenant"], letter["payload"], letter["payload_bytes"]) == ("acme", True, len(asked))
    path = f"/v1/dead/{letter['letter']}"
    got = await router.client.get(f"{path}/payload")
    assert (got.status_code, got.content) == (200, asked)
    assert (await router.client.get(path)).json()["id"] == asked[:16].hex()


async def test_only_operators_see_letters(router, until):
    """Payloads and letters are private data of a tenant."""
    await router.give_up(frame(), queue="requests.v1.d")
    path = f"/v1/dead/{(await one(router, until))['letter']}"
    calls = [
        ("GET", "/v1/dead"),
        ("GET", path),
        ("GET", f"{path}/payload"),
        ("POST", f"{path}/replay"),
        ("POST", "/v1/dead/replay"),
        ("DELETE", path),
    ]
    for method, target in calls:
        refused = await router.client.request(
            method, target, headers=as_principal(INFER, PUBLISH), json={} if method == "POST" else None
        )
        assert refused.status_code == 403, (method, target)
    assert (await router.client.get(f"{path}/payload", headers=as_principal(OPERATE))).status_code == 200


async def test_tensors_in_the_blob_store_are_copied(router, until):
    """The gateway deletes a claim's tensors after the reply; the letter has a copy."""
    data = [os.urandom(3000), b"x" * 500]
    claim = await router.claims.give(data, 30)
    asked = frame([claim], flags=envelope.RETRY_SAFE | envelope.CLAIM)
    await router.give_up(asked, queue="requests.v1.d")
    letter = await one(router, until)
    await router.claims.drop(claim)
    kept = envelope.read_request((await router.client.get(f"/v1/dead/{letter['letter']}/payload")).content)
    assert kept.data == data
    assert not kept.flags & envelope.CLAIM


async def test_without_its_tensors_a_letter_has_no_payload(router, until):
    claim = await router.claims.give([os.urandom(3000)], 30)
    await router.claims.drop(claim)
    await router.give_up(frame([claim], flags=envelope.CLAIM), queue="requests.v1.d")
    letter = await one(router, until)
    assert letter["payload"] is False
    assert "not in the blob store any more" in letter["missing"]
    assert (await router.client.get(f"/v1/dead/{letter['letter']}/payload")).status_code == 404


async def test_payloads_are_bounded_in_bytes_and_letters_in_number(router, until, tmp_path):
    async def newest(asked: bytes) -> bool:
        return [each["id"] for each in (await router.letters())[:1]] == [asked[:16].hex()]

    for _ in range(7):
        asked = frame([os.urandom(6000)])
        await router.give_up(asked, queue="requests.v1.d")
        await until(lambda asked=asked: newest(asked))
    letters = await router.letters()
    assert [letter["payload"] for letter in letters] == [True] * 3 + [False] * 2
    assert "TIDEGATE_DEAD_LETTER_BYTES" in letters[-1]["missing"]

    def bytes_kept() -> int:
        blobs = (tmp_path / "data" / "blobs").rglob("*")
        return sum(path.stat().st_size for path in blobs if path.is_file())

    # The list is right a moment before the oldest payload is deleted.
    await until(lambda: bytes_kept() <= 20_000)
    await router.give_up(frame([os.urandom(21_000)]), queue="requests.v1.d")

    async def payload_is_too_large() -> bool:
        return "more than TIDEGATE_DEAD_LETTER_BYTES" in (await router.letters())[0]["missing"]

    await until(payload_is_too_large)
    assert [letter["payload"] for letter in await router.letters()] == [False] + [True] * 3 + [False]


async def test_a_deleted_letter_leaves_no_payload(router, until, tmp_path):
    await router.give_up(frame(), queue="requests.v1.d")
    path = f"/v1/dead/{(await one(router, until))['letter']}"
    assert (await router.client.delete(path)).status_code == 204
    assert await router.letters() == []
    assert [each for each in (tmp_path / "data" / "blobs").rglob("*") if each.is_file()] == []
    assert (await router.client.get(path)).status_code == 404


async def test_an_undecodable_message_is_kept_unchanged(router, until):
    await router.give_up(body=b"garbage", queue="requests.v1.d", cause=UNDECODABLE)
    letter = await one(router, until)
    path = f"/v1/dead/{letter['letter']}"
    assert (await router.client.get(f"{path}/payload")).content == b"garbage"
    refused = await router.client.post(f"{path}/replay", json={})
    assert refused.status_code == 409


@pytest.fixture
def served(router) -> str:
    """A Deployment in the route table."""
    table = {
        "deployments": {"d": {"model": "m", "version": 2, "retry": "safe"}},
        "endpoints": {"e": {"targets": [{"deployment": "d", "weight": 100}]}},
    }
    router.app.state.replays._table = lambda: table
    return "d"


async def run_job(store: JobStore, id_: bytes, state: Any) -> None:
    (taken,) = await store.take([Take(id_, "w", False, 0, os.urandom(8))])
    assert taken.outcome == "run"
    error = {"reason": "model_failed", "message": "no"} if state == "failed" else None
    assert await store.finish([Finish(id_, taken.attempt, state, b"reply", error=error)]) == [True]


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("state", ["succeeded", "failed"])
async def test_a_replay_is_a_job_and_its_state_is_shown(
    router, until, served, jobs_url, rabbitmq_url, large, state
):
    data = [os.urandom(3000)] if large else DATA
    await router.give_up(frame(data, flags=envelope.RETRY_SAFE), queue="requests.v1.d", cause=NOT_RETRIED)
    path = f"/v1/dead/{(await one(router, until))['letter']}"
    response = await router.client.post(f"{path}/replay", json={}, headers=as_principal(OPERATE))
    assert response.status_code == 200, response.text
    (replay,) = response.json()["replays"]
    assert (replay["to"], replay["status"]) == ("d", "queued")
    store = JobStore.connect(jobs_url)
    job = await store.get(bytes.fromhex(replay["job"]))
    assert job is not None
    assert (job.principal, job.endpoint, job.model, job.version) == ("op", "e", "m", 2)
    got: list[bytes] = []

    async def consume(channel) -> None:
        async def taken(delivery) -> None:
            got.extend(bytes(each) for each in envelope.unpack(envelope.REQUESTS, delivery.body))
            channel.ack(delivery.tag)

        await channel.consume(jobs_queue("d", "normal"), taken, prefetch=10)

    async with Connection(rabbitmq_url, "worker", consume):
        (sent,) = await until(lambda: got)
    request = envelope.read_request(sent)
    found = await router.claims.redeem(request.data) if large else request.data
    assert (request.id, [bytes(each) for each in found]) == (job.id, data)
    await run_job(store, job.id, state)
    (shown,) = (await router.client.get(path)).json()["replays"]
    assert (shown["status"], bool(shown["error"])) == (state, state == "failed")
    await store.close()


async def test_all_are_replayed_once(router, until, served):
    for queue in ("requests.v1.d", "requests.v1.d", "requests.v1.other"):
        await router.give_up(frame(), queue=queue)

    async def all_there() -> bool:
        return len(await router.letters()) == 3

    await until(all_there)
    first = (await router.client.post("/v1/dead/replay", json={"deployment": "d"})).json()["items"]
    assert [bool(item["job"]) for item in first] == [True, True]
    second = (await router.client.post("/v1/dead/replay", json={})).json()["items"]
    assert len(second) == 1, "those that were replayed are left out"
    assert "there is no deployment 'other'" in second[0]["error"]
    third = (await router.client.post("/v1/dead/replay", json={"to": "d"})).json()["items"]
    assert [item["error"] for item in third] == [None]


async def test_a_job_whose_workers_were_lost(router, until, making):
    """The worker publishes the message to the exceptions; the finished record stays unchanged."""
    id_ = await making.running(retry_safe=False)
    (taken,) = await making.store.take([Take(id_, "w2", True, 0, os.urandom(8))])
    assert taken.outcome == "failed"
    asked = await making.store.request(id_)
    queue = f"jobs.v1.{making.deployment}.normal"
    await router.give_up(asked, queue=queue, cause=NOT_RETRIED)
    letter = await one(router, until, deployment=making.deployment)
    assert (letter["kind"], letter["id"], letter["cause"]) == ("job", id_.hex(), NOT_RETRIED)
    assert (await router.client.get(f"/v1/dead/{letter['letter']}/payload")).content == asked
    assert (await making.store.get(id_)).error["reason"] == "worker_lost"


async def test_a_restarted_router_has_all_letters(router, until, tmp_path):
    await router.give_up(frame(), queue="requests.v1.d")
    letter = await one(router, until)
    kept = router.app.state.dead_letters
    again = type(kept)(kept._journal, Blobs(f"file://{tmp_path}/data/blobs"), kept._claims, kept._limits)
    again.start()
    again.load()
    found = again.get(letter["letter"])
    assert found == kept.get(letter["letter"])
    assert await again.payload(found) == await kept.payload(found)
    await again.stop()
