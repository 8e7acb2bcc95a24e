"""Batches of keys that are revoked, expire or change while they run. The registry is real."""

from __future__ import annotations

import datetime as dt
import signal

import httpx
import pytest

from tests.conftest import PATIENCE_S
from tests.integration.gateway.conftest import registry
from tests.integration.gateway.test_control import AUDIENCE, ISSUER, Issuer
from tests.integration.gateway_jobs.test_batches import create, file_of, line, over, rows_of

__all__ = ["registry"]

pytestmark = pytest.mark.integration

LINES = 3000


@pytest.fixture(scope="module")
def gateway(gateways, registry):
    """A gateway that knows the registry's keys."""
    return gateways.start(registry_url=registry.url)


@pytest.fixture
async def key_client(gateway, registry, until):
    """``await key_client()``: a client with a new key that the gateway knows, and the key's id."""
    clients = []

    async def made():
        key = registry.key()
        headers = {"Authorization": f"Bearer {key['key']}"}
        client = httpx.AsyncClient(base_url=gateway.url, timeout=120, headers=headers)
        clients.append(client)

        async def known():
            return (await client.get("/v2/models")).status_code == 200

        await until(known)
        return client, key["id"]

    yield made
    for client in clients:
        await client.aclose()


def as_operator(gateway):
    headers = {"Authorization": "Bearer token"}
    return httpx.AsyncClient(base_url=gateway.url, timeout=120, headers=headers)


async def test_the_batch_of_a_revoked_key_ends_and_says_why(gateway, worker, registry, key_client, until):
    client, id_ = await key_client()
    async with as_operator(gateway) as operator:
        worker.open.clear()
        batch = await create(client, file_of(line(n) for n in range(LINES)))
        await until(lambda: worker.frames)
        registry("DELETE", f"/v1/keys/{id_}")
        done = await over(operator, batch, until)
        worker.open.set()
        assert done["status"] == "failed"
        assert done["error"].startswith(f"the key {id_} is revoked or expired")
        assert done["done"] == LINES, "each line is told of"
        assert done["counts"]["succeeded"] == 0
        rows = await rows_of(operator, batch)
        reasons = {row["error"]["reason"] for row in rows}
        assert reasons == {"cancelled", "key_revoked"}
        begun = (await operator.get("/v1/jobs", params={"batch": batch["id"], "limit": 1})).json()["items"]
        assert begun[0]["status"] == "cancelled"
        assert rows[-1]["job"] is None, "lines behind the window never became jobs"


async def test_jobs_of_a_gateway_that_died_are_cancelled_too(
    gateway, gateways, worker, registry, key_client, until
):
    client, id_ = await key_client()
    first = gateways.start(registry_url=registry.url)
    worker.open.clear()
    async with (
        as_operator(gateway) as operator,
        httpx.AsyncClient(base_url=first.url, timeout=120, headers=client.headers) as other,
    ):
        gateway.process.send_signal(signal.SIGSTOP)  # so that the batch runs in the first one
        try:
            batch = await create(other, file_of(line(n) for n in range(5)))

            async def submitted():  # a frame at the worker may be of a cancelled job of an earlier test
                return (await other.get("/v1/jobs", params={"batch": batch["id"]})).json()["items"]

            await until(submitted)
            first.process.kill()
            first.process.wait()
            registry("DELETE", f"/v1/keys/{id_}")
        finally:
            gateway.process.send_signal(signal.SIGCONT)
        done = await over(operator, batch, until, patience_s=PATIENCE_S)
        worker.open.set()
        assert done["status"] == "failed"
        rows = await rows_of(operator, batch)
        assert "cancelled" in {row["error"]["reason"] for row in rows}
        jobs = (await operator.get("/v1/jobs", params={"batch": batch["id"]})).json()["items"]
        assert {job["status"] for job in jobs} == {"cancelled"}


async def test_the_batch_of_a_key_that_expires_ends(gateway, worker, registry, key_client, until):
    client, id_ = await key_client()
    async with as_operator(gateway) as operator:
        worker.open.clear()
        batch = await create(client, file_of(line(n) for n in range(5)))
        await until(lambda: len(worker.frames) >= 5)
        soon = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=8)
        registry("PATCH", f"/v1/keys/{id_}", {"expires_at": soon.isoformat()})
        done = await over(operator, batch, until)
        worker.open.set()
        assert (done["status"], done["counts"]["cancelled"]) == ("failed", 5)
        assert id_ in done["error"]


async def test_lines_fail_after_their_key_lost_the_model(gateway, worker, registry, key_client, until):
    client, id_ = await key_client()
    worker.open.clear()
    batch = await create(client, file_of(line(n) for n in range(1300)))
    await until(lambda: worker.frames)
    registry("PATCH", f"/v1/keys/{id_}", {"endpoints": ["other"]})

    async def changed():
        return (await client.get("/v2/models/digits")).status_code == 403

    await until(changed)
    worker.open.set()
    done = await over(client, batch, until)
    assert done["status"] == "completed"
    assert done["counts"]["failed"] >= 1300 - 1024, "lines behind the window"
    assert done["counts"]["succeeded"] == 1300 - done["counts"]["failed"] > 0


async def test_the_batch_of_a_valid_key_continues(worker, key_client, until):
    client, _ = await key_client()
    batch = await create(client, file_of(line(n) for n in range(50)))
    done = await over(client, batch, until)
    assert (done["status"], done["error"], done["counts"]["succeeded"]) == ("completed", None, 50)


async def test_the_batch_of_a_jwt_caller_keeps_its_limits_in_another_gateway(
    gateway, gateways, worker, tmp_path, until
):
    """The second gateway has never seen a token of this caller, and there are no limits for everyone."""
    issuer = Issuer(tmp_path / "jwks.json")
    settings = {
        "jwks_url": str(issuer.path),
        "jwt_issuer": ISSUER,
        "jwt_audience": AUDIENCE,
        "jwt_roles_claim": "realm.roles",
        "jwt_role_scopes": '{"slow": ["infer"]}',
        "jwt_limits": '{"slow": {"day": 20}}',
    }
    first = gateways.start(**settings)
    worker.open.clear()
    headers = {"Authorization": f"Bearer {issuer.token(realm={'roles': ['slow']})}"}
    gateway.process.send_signal(signal.SIGSTOP)  # it has no limits for this caller
    try:
        async with httpx.AsyncClient(base_url=first.url, timeout=120, headers=headers) as client:
            batch = await create(client, file_of(line(n) for n in range(300)))
        await until(lambda: worker.frames)
        first.process.kill()
        first.process.wait()
        second = gateways.start(**settings)
        async with as_operator(second) as operator:

            async def limited():
                return 'limited_total{key="jwt",limit="day"}' in (await operator.get("/metrics")).text

            await until(limited)
            jobs = (await operator.get("/v1/jobs", params={"batch": batch["id"], "limit": 1000})).json()
            # A quota may be exceeded by what is in use when a gateway is killed, and between two settlements.
            assert len(jobs["items"]) < 100
            await operator.delete(batch["urls"]["cancel"])
            worker.open.set()
            assert (await over(operator, batch, until))["status"] == "cancelled"
    finally:
        gateway.process.send_signal(signal.SIGCONT)
