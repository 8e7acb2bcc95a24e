"""The rights of the services' accounts at a real RabbitMQ and real Valkeys."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from pamqp import commands
from redis import Redis
from redis.exceptions import AuthenticationError, NoPermissionError

from tests.conftest import PATIENCE_S
from tidegate.kernel import credentials
from tidegate.kernel.broker.amqp.channel import AmqpChannel
from tidegate.kernel.broker.connection import Channel, Connection, Unroutable
from tidegate.kernel.broker.permissions import JOB_STORE, LIVE_STORE
from tidegate.kernel.broker.topology import (
    CANCELS,
    EVENTS,
    EXCEPTIONS,
    REGISTRY_CHANGED,
    USAGE,
    WARM,
    WORKERS,
    Exchange,
    Queue,
    cancels_queue,
    events_queue,
    jobs_queue,
    replies_queue,
    requests_queue,
    warm_queue,
)
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.store import StoreUnavailable
from tidegate.kernel.store.leader import LeaderStore
from tidegate.stack import accounts, rabbitmq, valkey
from tidegate.stack.ports import free_ports
from tidegate.stack.standalone import running

pytestmark = pytest.mark.integration

REQUESTS, REPLIES, OFFERS = requests_queue("m"), replies_queue("0a"), warm_queue("cpu")
OWNED = {
    "gateway": (REQUESTS, REPLIES, USAGE, EVENTS, CANCELS),
    "router": (EXCEPTIONS,),
    "autoscaler": (OFFERS,),
}
CLIENTS = ("gateway", "registry", "router", "autoscaler", "worker")


@dataclass(frozen=True)
class Servers:
    """Start the servers as `make up` does."""

    secrets: Path
    amqp: str
    live: str
    jobs: str

    def connection(self, service: str) -> Connection:
        """Open a connection of a service to the broker."""
        url = credentials.logged_in(self.amqp, self.secrets, credentials.RABBITMQ, service)
        return Connection(url, f"test {service}", _nothing, fast=True)

    def store(self, server: str, service: str) -> Redis:
        """Return a client of a service for one of the stores."""
        url = self.live if server == credentials.VALKEY else self.jobs
        return Redis.from_url(credentials.logged_in(url, self.secrets, server, service))


async def _nothing(_: Channel) -> None:
    return


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("accounts")
    secrets = folder / "secrets"
    credentials.ensure(secrets)
    passwords = {server: credentials.read_all(secrets, server) for server in credentials.SERVERS}
    port, dist, epmd, live, jobs = free_ports(5)
    children = [
        *rabbitmq.children(
            folder / "rabbitmq", port=port, dist_port=dist, epmd_port=epmd, environ=os.environ,
            definitions=accounts.rabbitmq_definitions(passwords["rabbitmq"]),
        ),
        valkey.child(
            folder / "live", port=live, environ=os.environ,
            users=accounts.valkey_users(passwords["valkey"], LIVE_STORE),
            login=("registry", secrets / "valkey" / "registry"),
        ),
        valkey.jobs_child(
            folder / "jobs", port=jobs, environ=os.environ,
            users=accounts.valkey_users(passwords["valkey-jobs"], JOB_STORE),
            login=("registry", secrets / "valkey-jobs" / "registry"),
        ),
    ]  # fmt: skip
    with running(children, folder):
        yield Servers(
            secrets,
            f"amqp://127.0.0.1:{port}/",
            f"redis://127.0.0.1:{live}/0",
            f"redis://127.0.0.1:{jobs}/0",
        )


async def refused(connection: Connection, deed: str, what: Queue | str) -> bool:
    """Return True if the broker rejects an action. It then closes the connection, which reconnects."""
    channel = await connection.wait_up(PATIENCE_S)
    try:
        if deed == "declare":
            await channel.declare(what, bind=False)  # type: ignore[arg-type]
        elif deed == "consume":
            await channel.consume(what, lambda _: None, prefetch=1, no_ack=True)  # type: ignore[arg-type]
        elif deed == "delete":
            assert isinstance(channel, AmqpChannel)
            await channel._call(commands.Exchange.Delete(exchange=str(what)))
        elif deed == "bind":
            await channel.bind(what, WORKERS, "replies.v1.0a")  # type: ignore[arg-type]
        else:
            await channel.publish(b"x", exchange=deed, routing_key=str(what), mandatory=True)
    except Unroutable:
        return False
    except Unavailable as error:
        return "ACCESS_REFUSED" in error.message
    return False


async def test_default_users_and_empty_passwords_are_rejected(servers: Servers) -> None:
    for user in ("", "guest:guest@", "worker:worker@", "guest:@"):
        connection = Connection(servers.amqp.replace("//", f"//{user}"), "intruder", _nothing)
        async with connection:
            with pytest.raises(Unavailable, match=r"403|ACCESS_REFUSED|refused"):
                await connection.wait_up(1.5)


async def test_each_account_may_do_its_services_work(servers: Servers) -> None:
    """Declare, bind, publish and consume like each service, with its own account."""
    mine: dict[str, list[Queue | Exchange]] = {
        "gateway": [EVENTS, CANCELS, REPLIES, REQUESTS, USAGE, jobs_queue("m", "high")],
        "registry": [EVENTS, USAGE],
        "router": [EVENTS, CANCELS, REQUESTS, EXCEPTIONS, jobs_queue("m", "high")],
        "autoscaler": [EVENTS, OFFERS],
        "worker": [],
    }
    for service, declared in mine.items():
        async with servers.connection(service) as connection:
            channel = await connection.wait_up(PATIENCE_S)
            for each in declared:
                await channel.declare(each)
            if service in ("gateway", "router", "autoscaler"):
                events = events_queue(service, "0b")
                await channel.declare(events)
                await channel.bind(events, EVENTS, REGISTRY_CHANGED)
                await channel.consume(events, lambda _: None, prefetch=1, no_ack=True)
            if service == "worker":
                await channel.find(CANCELS)
                await channel.find(WORKERS)
                for queue in (REQUESTS, OFFERS, jobs_queue("m", "high")):
                    await channel.declare(queue, bind=False)
                    await channel.consume(queue, lambda _: None, prefetch=1, no_ack=True)
                cancels = cancels_queue("m-0-1", "0c")
                await channel.declare(cancels)
                await channel.bind(cancels, CANCELS)
                for key in (REPLIES.name, REQUESTS.name, EXCEPTIONS.name):
                    await channel.publish(b"x", exchange=WORKERS.name, routing_key=key, mandatory=True)
    async with servers.connection("autoscaler") as connection:
        await (await connection.wait_up(PATIENCE_S)).publish(
            b"x", exchange=WARM.name, routing_key=OFFERS.name, mandatory=True
        )
    async with servers.connection("registry") as connection:
        channel = await connection.wait_up(PATIENCE_S)
        await channel.publish(b"x", exchange=EVENTS.name, routing_key=REGISTRY_CHANGED)


@pytest.mark.parametrize(
    ("service", "deed", "what"),
    [
        ("worker", "", OFFERS.name),  # an offer of a model to run
        ("worker", WARM.name, OFFERS.name),
        ("worker", "", USAGE.name),  # somebody else's bill
        ("worker", "", REQUESTS.name),
        ("worker", EVENTS.name, REGISTRY_CHANGED),
        ("worker", CANCELS.name, ""),  # everybody's requests
        ("worker", "consume", REPLIES),  # other callers' answers
        ("worker", "consume", USAGE),
        ("worker", "consume", EXCEPTIONS),
        ("worker", "bind", REQUESTS),  # a copy of what other workers answer
        ("worker", "declare", Queue("spy")),
        ("worker", "declare", EXCEPTIONS),
        ("worker", "delete", WORKERS.name),  # and with it everybody's answers
        ("worker", "delete", CANCELS.name),
        ("registry", "", REQUESTS.name),
        ("registry", "consume", REQUESTS),
        ("registry", WORKERS.name, REPLIES.name),
        ("autoscaler", "", REQUESTS.name),
        ("autoscaler", "consume", REQUESTS),
        ("autoscaler", WORKERS.name, REPLIES.name),
        ("gateway", "consume", REQUESTS),
        ("gateway", "consume", USAGE),
        ("gateway", WORKERS.name, REPLIES.name),
        ("router", "consume", REPLIES),
        ("router", "consume", REQUESTS),
        ("router", EVENTS.name, REGISTRY_CHANGED),
    ],
)
async def test_the_rest_is_refused(servers: Servers, service: str, deed: str, what: Queue | str) -> None:
    for owner, queues in OWNED.items():
        async with servers.connection(owner) as connection:
            for each in queues:
                await (await connection.wait_up(PATIENCE_S)).declare(each)
    async with servers.connection(service) as connection:
        assert await refused(connection, deed, what)


@pytest.mark.parametrize("server", [credentials.VALKEY, credentials.VALKEY_JOBS])
def test_a_store_requires_a_password(servers: Servers, server: str) -> None:
    url = servers.live if server == credentials.VALKEY else servers.jobs
    store = Redis.from_url(url)
    for deed in (store.ping, lambda: store.get("tidegate:routes"), store.flushall):
        with pytest.raises(AuthenticationError):
            deed()
    with pytest.raises(AuthenticationError):
        Redis.from_url(url.replace("//", "//worker:guessed@")).get("x")
    # A client without a login may not send much. After a login, a server accepts 1 GB.
    with socket.create_connection(("127.0.0.1", urlsplit(url).port or 0), 20) as door:
        door.sendall(b"*2\r\n$4\r\nPING\r\n$314572800\r\n")
        assert door.recv(100).startswith(b"-ERR Protocol error: unauthenticated bulk length")


@pytest.mark.parametrize("service", CLIENTS)
@pytest.mark.parametrize("server", [credentials.VALKEY, credentials.VALKEY_JOBS])
def test_no_service_may_administer_a_store(servers: Servers, server: str, service: str) -> None:
    store = servers.store(server, service)
    for command in ("CONFIG GET dir", "ACL LIST", "FLUSHALL", "SAVE", "KEYS *"):
        with pytest.raises(NoPermissionError):
            store.execute_command(*command.split())


def test_a_worker_may_write_only_its_own_facts(servers: Servers) -> None:
    worker, gateway = servers.store("valkey", "worker"), servers.store("valkey", "gateway")
    for kind in ("replica", "model", "claim", "statistics"):
        assert worker.set(f"tidegate:{kind}:m", "1", px=1000)
    gateway.set("tidegate:routes", "{}")
    for deed in (
        lambda: worker.set("tidegate:routes", "{}"),
        lambda: worker.get("tidegate:routes"),
        lambda: worker.set("tidegate:statuses", "{}"),
        lambda: worker.get("tidegate:limit:key"),
        lambda: worker.publish("tidegate:routes:changed", ""),
        lambda: worker.eval("return redis.call('get', 'tidegate:routes')", 0),
        lambda: worker.scan(),
    ):
        with pytest.raises(NoPermissionError):
            deed()


async def test_a_worker_cannot_take_the_lease_of_the_routers(servers: Servers) -> None:
    def store(service: str) -> LeaderStore:
        url = credentials.logged_in(servers.jobs, servers.secrets, credentials.VALKEY_JOBS, service)
        return LeaderStore.connect(url)

    worker, router = store("worker"), store("router")
    with pytest.raises(StoreUnavailable):
        await worker.claim("worker", 60.0, 0)
    assert (await router.claim("router", 60.0, 0)).holder == "router"
    with pytest.raises(StoreUnavailable):
        await worker.resign("router")
    await router.resign("router")
    await worker.close()
    await router.close()
