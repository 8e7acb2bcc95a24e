"""The router's routes for jobs: the ledger, and the secrets of webhooks."""

from __future__ import annotations

import stat
from collections.abc import AsyncIterator

import httpx
import pytest

from services.router.app import build
from services.router.application import job_sweeper as sweeper_module
from services.router.application import ledger as ledger_module
from services.router.domain.webhooks import secret_of
from services.router.settings import RouterSettings
from tests.conftest import PATIENCE_S
from tidegate.kernel.broker.connection import Channel, Connection
from tidegate.kernel.broker.topology import jobs_queue
from tidegate.kernel.protocol.access import INFER, PRINCIPAL_HEADER, Principal
from tidegate.stack.ports import free_ports

pytestmark = pytest.mark.integration


@pytest.fixture
def quick(monkeypatch) -> None:
    """Do not wait for workers' reports, and treat no job as too young to be lost."""
    monkeypatch.setattr(ledger_module, "REPORTS_S", 0.02)
    monkeypatch.setattr(sweeper_module, "LOST_AFTER_MS", 0)


@pytest.fixture
async def router(rabbitmq_url, valkey_url, registry, store, tmp_path) -> AsyncIterator[httpx.AsyncClient]:
    """A complete router, and a client with the service token."""
    settings = RouterSettings(
        state_dir=tmp_path,
        service_token="token",
        router_port=free_ports(1)[0],
        amqp_url=rabbitmq_url,
        redis_url=valkey_url,
        jobs_url=valkey_url,
        registry_url=registry.url,
        ledger_interval_s=0.02,
        job_sweep_interval_s=0.02,
    )
    app = build(settings)
    headers = {"Authorization": "Bearer token"}
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://127.0.0.1", headers=headers
        ) as client,
    ):
        yield client


def header(id_: str, *scopes: str) -> dict[str, str]:
    return {PRINCIPAL_HEADER.decode(): Principal(id_, id_, frozenset(scopes)).to_header()}


async def test_the_ledger(router, until):
    async def known() -> bool:
        return (await router.get("/v1/ledger")).json()["unaccounted"] == 0

    await until(known)
    assert "tidegate_jobs_unaccounted 0.0" in (await router.get("/metrics")).text
    assert (await router.get("/v1/ledger", headers=header("a", INFER))).status_code == 403


async def test_secrets_are_each_principals_own(router, tmp_path):
    path = tmp_path / "webhook-secret"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    master = path.read_text().strip().encode()
    own = (await router.get("/v1/webhooks/secret", headers=header("a", INFER))).json()
    assert own == {"principal": "a", "secret": secret_of(master, "a")}
    other = await router.get("/v1/webhooks/secret?principal=b", headers=header("a", INFER))
    assert other.status_code == 403
    assert (await router.get("/v1/webhooks/secret", headers=header("a"))).status_code == 403
    asked = (await router.get("/v1/webhooks/secret?principal=anonymous")).json()
    assert asked["secret"] == secret_of(master, "anonymous")


async def test_the_secret_outlives_the_router(router, tmp_path):
    from services.router.adapters.webhook_secret import load

    path = tmp_path / "webhook-secret"
    assert load(path) == load(path)
    assert [p.name for p in tmp_path.glob("webhook-secret*")] == ["webhook-secret"]


async def test_it_is_ready_with_all_its_sources(router, until):
    async def well() -> bool:
        return (await router.get("/health/ready")).status_code == 200

    await until(well)


async def test_jobs_outlive_the_loss_of_their_messages(quick, router, making, rabbitmq_url, until):
    """The ledger misses the jobs, the sweeper publishes them again, and the ledger returns to 0."""
    for _ in range(3):
        await making.store.queued([await making.accepted()])  # and no message: as after the loss of a disk

    async def unaccounted() -> int | None:
        found: int | None = (await router.get("/v1/ledger")).json()["unaccounted"]
        return found

    async def setup(channel: Channel) -> None:
        await channel.declare(jobs_queue(making.deployment, "normal"))

    async with Connection(rabbitmq_url, "test", setup) as connection:
        channel = await connection.wait_up(PATIENCE_S)

        async def there() -> bool:
            return await channel.depth(jobs_queue(making.deployment, "normal")) == 3

        await until(there)

        async def well() -> bool:
            return await unaccounted() == 0

        await until(well)
