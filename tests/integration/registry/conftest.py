"""The real app on SQLite and on PostgreSQL: the server of TIDEGATE_TEST_DATABASE_URL, or a separate one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
import sqlalchemy as sa
import uvicorn
from starlette.datastructures import State

from services.registry.adapters.artifacts import ArtifactStore
from services.registry.adapters.sql import migrate
from services.registry.adapters.sql.database import engine_for
from services.registry.app import build
from services.registry.application.maintenance import Maintenance
from services.registry.application.transactions import Transactions
from services.registry.application.uploads import Uploads
from services.registry.settings import RegistrySettings
from tests.conftest import PATIENCE_S
from tests.integration.kernel.s3 import S3, SERVERS
from tests.integration.registry import postgres as postgresql

TOKEN = "registry-test-token"
TEMPLATE = "migrated"
# Nothing listens on the discard port: the broker is away, and writes must succeed all the same.
NO_BROKER = "amqp://guest:guest@127.0.0.1:9/"


class Clock:
    """A clock for the registry that tests move forward."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def forward(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


class Caller:
    """A client of the registry that returns decoded bodies."""

    def __init__(
        self, http: httpx.AsyncClient, state: State, clock: Clock, settings: RegistrySettings
    ) -> None:
        self.http = http
        self.transactions: Transactions = state.transactions
        self.store: ArtifactStore = state.artifacts.store
        self.uploads: Uploads = state.uploads
        self.clock = clock
        self.settings = settings
        self.maintenance: Maintenance = state.maintenance

    async def __call__(
        self, method: str, path: str, body: Any = None, *, status: int | None = None, **more: Any
    ) -> Any:
        answer = await self.http.request(method, path, json=body, **more)
        expected = (200, 201, 204) if status is None else (status,)
        assert answer.status_code in expected, f"{answer.status_code}: {answer.text}"
        return answer.json() if answer.content else None

    async def upload(self, content: bytes) -> str:
        answer = await self.http.put("/v1/artifacts", content=content)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["sha256"])

    async def register(self, model: str, content: bytes, filename: str = "model.onnx", **more: Any) -> Any:
        body = {"artifact": await self.upload(content), "filename": filename, **more}
        return await self("POST", f"/v1/models/{model}/versions", body)

    async def broker_connected(self) -> None:
        """Wait until the broker is connected: notifications are not kept for later."""
        await self.transactions.notifier.connection.wait_up(PATIENCE_S)

    async def maintain(self) -> None:
        """Do what the registry does every ten minutes, now."""
        await self.maintenance.collect()

    def stored(self) -> list[str]:
        """Return the digests of the files in the artifact store."""
        root = Path(self.settings.artifact_url.removeprefix("file://"))
        return sorted(path.name for path in (root / "sha256").rglob("*") if path.is_file())

    def incoming(self) -> list[Path]:
        """Return the files of uploads in progress."""
        root = Path(self.settings.artifact_url.removeprefix("file://"))
        return list((root / "incoming").iterdir())


@pytest.fixture(scope="session")
def postgres() -> Iterator[postgresql.Server]:
    """A PostgreSQL of this xdist worker. Tests that need it are skipped if none can be started."""
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(postgresql.running())
        except postgresql.NoPostgres as reason:
            pytest.skip(str(reason))
        asyncio.run(_make_template(server))
        yield server


async def _make_template(server: postgresql.Server) -> None:
    async with _admin(server) as admin:
        await admin.execute(f"CREATE DATABASE {TEMPLATE}")
    await migrate.migrate(server.url(TEMPLATE))


@asynccontextmanager
async def _admin(server: postgresql.Server) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(host=str(server.folder), user="tidegate", database="postgres")
    try:
        yield connection
    finally:
        await connection.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def server(request: pytest.FixtureRequest) -> postgresql.Server | str:
    """The kind of database: PostgreSQL by its server or by a URL, or SQLite (empty)."""
    if request.param == "sqlite":
        return ""
    return os.environ.get("TIDEGATE_TEST_DATABASE_URL") or request.getfixturevalue("postgres")


@pytest.fixture
async def database_url(server: postgresql.Server | str, tmp_path: Path) -> AsyncIterator[str]:
    """An empty, migrated database of each kind."""
    if isinstance(server, str):
        url = server or f"sqlite+aiosqlite:///{tmp_path}/data/registry.db"
        if server:
            await _emptied(url)
        await migrate.migrate(url)
        yield url
        return
    name = f"t{os.urandom(8).hex()}"
    async with _admin(server) as admin:
        await admin.execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
        yield server.url(name)
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
async def sqlite_url(tmp_path: Path) -> str:
    """An empty, migrated database for tests that do not depend on its kind."""
    url = f"sqlite+aiosqlite:///{tmp_path}/data/registry.db"
    await migrate.migrate(url)
    return url


async def _emptied(url: str) -> None:
    engine = engine_for(url)
    async with engine.begin() as connection:
        await connection.execute(sa.text("DROP SCHEMA public CASCADE"))
        await connection.execute(sa.text("CREATE SCHEMA public"))
    await engine.dispose()


@pytest.fixture(params=["file", *SERVERS])
def artifact_url(request: pytest.FixtureRequest, tmp_path: Path, s3_at: Callable[[str], S3]) -> str:
    """The URL of an artifact store of each kind."""
    return s3_at(request.param).url if request.param in SERVERS else f"file://{tmp_path}/artifacts"


Open = Callable[..., AbstractAsyncContextManager[Caller]]


@pytest.fixture
def opened(tmp_path: Path, database_url: str) -> Open:
    """Start the registry with the test's settings."""

    @asynccontextmanager
    async def start(**chosen: Any) -> AsyncIterator[Caller]:
        values: dict[str, Any] = {
            "state_dir": tmp_path,
            "service_token": TOKEN,
            "database_url": database_url,
            "amqp_url": NO_BROKER,
            "verification": "off",  # no autoscaler runs here, so versions would stay pending
        }
        settings = RegistrySettings(**(values | chosen))
        clock = Clock()
        app = build(settings, clock)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(
                transport=httpx.ASGITransport(app),
                base_url="http://127.0.0.1",
                headers={"Authorization": f"Bearer {TOKEN}"},
            ) as http,
        ):
            yield Caller(http, app.state, clock, settings)

    return start


@pytest.fixture
async def call(opened: Open) -> AsyncIterator[Caller]:
    """The registry with default settings."""
    async with opened() as caller:
        yield caller


@asynccontextmanager
async def serving(settings: RegistrySettings) -> AsyncIterator[httpx.AsyncClient]:
    """Run the registry behind a real server in the block. Yield a client with the service token."""
    server = uvicorn.Server(uvicorn.Config(build(settings), log_config=None, access_log=False))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}",
            headers={"Authorization": f"Bearer {TOKEN}"},
            transport=httpx.AsyncHTTPTransport(retries=20),
            timeout=PATIENCE_S,
        ) as http:
            while not server.started:
                await asyncio.sleep(0.01)
            yield http
        server.should_exit = True
        await serving
