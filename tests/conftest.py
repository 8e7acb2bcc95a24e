"""What the tests of all rooms stand on: real servers for a session, a line that can be cut, waiting.

Every xdist worker has servers of its own, on free ports and in folders that go with it.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import fcntl
import functools
import gc
import inspect
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from httpx._transports import default as httpx_transport
from hypothesis import settings as hypothesis_settings
from yarl import URL

from tidegate.kernel import quick_start

# The same examples each time: a test that fails fails for everybody, and leaves no files. A longer run
# (`make fuzz`) has others each time, and prints how to repeat one that failed.
EXAMPLES = int(os.environ.get("TIDEGATE_FUZZ_EXAMPLES", "1"))
hypothesis_settings.register_profile(
    "tidegate",
    deadline=None,
    derandomize=EXAMPLES == 1,
    database=None,
    max_examples=100 * EXAMPLES,
    print_blob=True,
)
hypothesis_settings.load_profile("tidegate")

# Every client, and so each call without one, reads the certificates of all authorities: 20 ms, for http too.
# Here they are read once.
httpx_transport.create_ssl_context = functools.cache(  # type: ignore[attr-defined]
    httpx.create_ssl_context
)

FIGURE = "figure"
Figure = Callable[[str], None]
MadeOnce = Callable[[str, Callable[[Path], object]], Path]

PATIENCE_S = 120.0
POLL_S = 0.005


def pytest_configure() -> None:
    """Keep tests out of the user's config folder, and let a run that is told to stop stop its servers too."""
    # Stacks of tests write their contexts there; what they start inherits it.
    folder = tempfile.TemporaryDirectory(prefix="tidegate-config-", ignore_cleanup_errors=True)
    atexit.register(folder.cleanup)
    os.environ["XDG_CONFIG_HOME"] = folder.name
    os.environ.pop("TIDEGATE_CONFIG_DIR", None)
    os.environ.pop("TIDEGATE_CONTEXT", None)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        # A shell starts background jobs with SIGINT ignored, and what they start inherits that.
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect tests without the garbage collector, which takes a third of the CPU time and frees nothing."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    """Keeps the garbage collector from walking thousands of tests and their modules over and over.

    It runs more seldom as well, as in the services; :func:`nothing_unraisable` sees to what it has not found.
    """
    gc.collect()
    quick_start.loaded()


class FailureReporter:
    """Name a failed test at once, because a whole run takes a quarter of an hour."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self._terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Print the test's name and the last line of its error."""
        if report.failed:
            *_, last = report.longreprtext.strip().splitlines() or [""]
            self._terminal.ensure_newline()
            self._terminal.write_line(f"{report.when} of {report.nodeid} failed: {last}")


@pytest.hookimpl(trylast=True)  # after pytest has made its terminal reporter
def pytest_sessionstart(session: pytest.Session) -> None:
    """Report failures as they happen. With xdist, only the process that prints does so."""
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None and not hasattr(session.config, "workerinput"):
        session.config.pluginmanager.register(FailureReporter(terminal))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The figures that tests saw on their way, from whichever process ran them."""
    passed = terminalreporter.getreports("passed")
    found = [text for each in passed for name, text in each.user_properties if name == FIGURE]
    if found:
        terminalreporter.section("measured")
        terminalreporter.write("".join(f"{text}\n" for text in found))


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Figure:
    """``figure(text)``: a line for the end of the run."""
    return functools.partial(record_property, FIGURE)


@pytest.fixture(scope="session", autouse=True)
def nothing_unraisable() -> Iterator[None]:
    """What fails in a destructor is told by the last test at the latest, if nothing was collected before."""
    yield
    gc.collect()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that a model's user can reach and write to; pytest's own are closed to other users."""
    with tempfile.TemporaryDirectory(prefix="tidegate-open-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """``made_once(name, fill)``: what ``fill`` put into a folder, for all processes of this run to read."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def made(name: str, fill: Callable[[Path], object]) -> Path:
        folder, partly = shared / name, shared / f"{name}.part"
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                shutil.rmtree(partly, ignore_errors=True)
                partly.mkdir()
                fill(partly)
                partly.rename(folder)
        return folder

    return made


@pytest.fixture(scope="session")
def rabbitmq_url() -> Iterator[str]:
    """The AMQP URL of a RabbitMQ that belongs to this xdist worker."""
    from tidegate.stack.standalone import rabbitmq_running  # unit tests do not need it

    with (
        tempfile.TemporaryDirectory(prefix="tidegate-rabbitmq-") as folder,
        rabbitmq_running(Path(folder)) as url,
    ):
        asyncio.run(with_exchanges(url))
        yield url


async def with_exchanges(url: str) -> None:
    """Declare what gateways and routers declare and workers only look for."""
    from tidegate.kernel.broker.connection import Channel, Connection
    from tidegate.kernel.broker.topology import CANCELS, WORKERS

    async def declare(channel: Channel) -> None:
        await channel.declare(CANCELS)
        await channel.declare(WORKERS)

    async with Connection(url, "tests", declare) as connection:
        await connection.wait_up(PATIENCE_S)


@pytest.fixture(scope="session")
def valkey_url() -> Iterator[str]:
    """The URL of a Valkey that belongs to this xdist worker."""
    from tidegate.stack.standalone import valkey_running

    with (
        tempfile.TemporaryDirectory(prefix="tidegate-valkey-") as folder,
        valkey_running(Path(folder)) as url,
    ):
        yield url


@pytest.fixture(scope="session")
def jobs_url() -> Iterator[str]:
    """The URL of a Valkey for jobs that belongs to this xdist worker."""
    from tidegate.stack.standalone import jobs_running

    with (
        tempfile.TemporaryDirectory(prefix="tidegate-jobs-") as folder,
        jobs_running(Path(folder)) as url,
    ):
        yield url


@pytest.fixture
def fresh() -> Callable[[str], str]:
    """Makes a name that no other test has, so that tests may share a broker."""
    return lambda name: f"{name}-{os.urandom(4).hex()}"


async def _until(true: Callable[[], Any], what: str = "", patience_s: float = PATIENCE_S) -> Any:
    end = time.monotonic() + patience_s
    while True:
        found = true()
        if inspect.isawaitable(found):
            found = await found
        if found:
            return found
        assert time.monotonic() < end, f"not within {patience_s} s: {what or inspect.getsource(true).strip()}"
        await asyncio.sleep(POLL_S)


@pytest.fixture(scope="session")
def until() -> Callable[..., Awaitable[Any]]:
    """``await until(condition)``: polls it, gives what it gave, fails when it never was true."""
    return _until


class Line:
    """A TCP proxy in front of a server: the line to it, which a test may cut, take down and put up again."""

    def __init__(self, url: str) -> None:
        self._server_url = URL(url)
        self._listener: asyncio.Server | None = None
        self._port = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._pumps: set[asyncio.Task[None]] = set()
        self.flows = asyncio.Event()  # cleared, nothing comes through, and the connections stay open
        self.flows.set()

    @property
    def url(self) -> str:
        """The server's URL by way of this line."""
        return str(self._server_url.with_host("127.0.0.1").with_port(self._port))

    @property
    def connections(self) -> int:
        """Open connections, counted at the client's side."""
        return len(self._writers) // 2

    async def up(self) -> None:
        """Take connections, on the same port each time."""
        self._listener = await asyncio.start_server(self._connected, "127.0.0.1", self._port)
        self._port = self._listener.sockets[0].getsockname()[1]

    async def down(self) -> None:
        """Refuse connections and cut those that are open."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        self.cut()

    def cut(self) -> None:
        """Break the open connections, as a pulled plug does it; new ones are taken."""
        for writer in self._writers:
            writer.transport.abort()

    async def close(self) -> None:
        """The end."""
        await self.down()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(
                self._server_url.host, self._server_url.port
            )
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, far_writer}
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            pump = asyncio.create_task(self._pump(source, sink))
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                await self.flows.wait()
                sink.write(data)
                await sink.drain()
        sink.transport.abort()
        self._writers.discard(sink)


@pytest.fixture
async def line(rabbitmq_url: str) -> AsyncIterator[Line]:
    """A line to the broker."""
    found = Line(rabbitmq_url)
    await found.up()
    yield found
    await found.close()


@pytest.fixture
async def line_out(rabbitmq_url: str) -> AsyncIterator[Line]:
    """A second line to the broker, for what publishes and consumes on links of its own."""
    found = Line(rabbitmq_url)
    await found.up()
    yield found
    await found.close()
