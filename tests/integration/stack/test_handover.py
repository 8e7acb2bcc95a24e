"""A child whose sockets the supervisor keeps: restarts and crashes, with small real processes."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PATIENCE_S
from tidegate.stack import child_supervisor
from tidegate.stack.child import Child, Port, Probe
from tidegate.stack.child_supervisor import ChildSupervisor
from tidegate.stack.errors import ChildFailed
from tidegate.stack.ports import free_ports

pytestmark = pytest.mark.integration

SERVER = """
import json, os, pathlib, signal, socket, sys, time

name, folder = os.environ["NAME"], pathlib.Path(sys.argv[1])
(folder / f"{name}-{os.getpid()}").touch()
if name.startswith("broken"):
    sys.exit(3)
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))
while (folder / f"hold-{name}").exists():
    time.sleep(0.01)
listener = socket.socket(fileno=json.loads(os.environ["TIDEGATE_SOCKETS"])["http"][0])
listener.listen()
if "TIDEGATE_READY_FD" in os.environ:
    os.write(int(os.environ["TIDEGATE_READY_FD"]), b".")
while True:
    connection, _ = listener.accept()
    connection.recv(1000)
    body = f"{name} {os.getpid()}".encode()
    connection.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body) + body)
    connection.close()
"""


class Bench:
    """A supervised server, and the processes that it has had. Each writes its name and pid into a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_ports(1)[0]
        (folder / "server.py").write_text(SERVER)
        self.states: list[str] = []
        self.supervisor = ChildSupervisor(
            self.child("first"),
            folder / "log",
            lambda **changes: self.states.append(changes["state"]),
            {"server": asyncio.Event()},
        )

    def child(self, name: str) -> Child:
        port = Port(self.port, "PORT")
        return Child(
            name="server",
            argv=(sys.executable, str(self.folder / "server.py"), str(self.folder)),
            env={"NAME": name},
            probe=Probe("http", self.port),
            stop_order=0,
            ports=(port,),
            sockets={"http": port},
        )

    def started(self, name: str) -> list[int]:
        return [int(each.name.rpartition("-")[2]) for each in self.folder.glob(f"{name}-[0-9]*")]

    async def ask(self) -> str:
        """Return the name and pid of the process that answers."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(b"GET / HTTP/1.1\r\n\r\n")
            async with asyncio.timeout(PATIENCE_S):
                return (await reader.read()).rpartition(b"\r\n")[2].decode()
        finally:
            writer.close()


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    found = Bench(tmp_path)
    running = asyncio.create_task(found.supervisor.run())
    async with asyncio.timeout(PATIENCE_S):
        await found.supervisor.ready["server"].wait()
    yield found
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    found.supervisor.close()
    for each in (found.supervisor.process, *found.supervisor._others):
        if each is not None:
            each.kill()
            each.wait()


async def test_the_old_process_answers_until_the_new_one_is_ready(bench: Bench, until: Any):
    old = bench.supervisor.process
    assert old is not None
    (bench.folder / "hold-second").touch()
    replacing = asyncio.create_task(bench.supervisor.replace(bench.child("second")))
    await until(lambda: bench.started("second"))
    assert await bench.ask() == f"first {old.pid}"
    (bench.folder / "hold-second").unlink()
    await replacing
    await until(lambda: old.poll() is not None)
    assert await bench.ask() == f"second {bench.started('second')[0]}"
    assert bench.supervisor.restarts == 1
    assert bench.states[-1] == "ready"


async def test_a_process_that_dies_while_the_new_one_starts_has_no_other_successor(bench: Bench, until: Any):
    (bench.folder / "hold-second").touch()
    replacing = asyncio.create_task(bench.supervisor.replace(bench.child("second")))
    await until(lambda: bench.started("second"))
    old = bench.supervisor.process
    assert old is not None
    old.kill()
    old.wait()
    waits = asyncio.create_task(bench.ask())
    await asyncio.sleep(2 * child_supervisor.BACKOFF_S[0])
    (bench.folder / "hold-second").unlink()
    await replacing
    assert await waits == f"second {bench.started('second')[0]}", "nobody was refused meanwhile"
    await asyncio.sleep(0.5)
    assert (len(bench.started("first")), len(bench.started("second"))) == (1, 1)
    assert await bench.ask() == f"second {bench.started('second')[0]}"


async def test_a_new_process_that_cannot_start_leaves_the_old_one(bench: Bench):
    first = await bench.ask()
    with pytest.raises(ChildFailed, match="exited with 3 while starting; the old process still serves"):
        await bench.supervisor.replace(bench.child("broken"))
    assert await bench.ask() == first
    assert bench.states[-1] == "ready"
    late = replace(bench.child("slow"), start_limit_s=0.5)
    (bench.folder / "hold-slow").touch()
    with pytest.raises(ChildFailed, match="was not ready after 0 s"):
        await bench.supervisor.replace(late)
    assert await bench.ask() == first


async def test_a_crash_during_a_handover_refuses_nobody(bench: Bench, until: Any):
    """The new process may already listen at the sockets. A refusal would end that."""
    async with bench.supervisor._starts:
        bench.supervisor._deaths = 1
        assert bench.supervisor.process is not None
        bench.supervisor.process.kill()
        await until(lambda: bench.states[-1] == "restarting")
        waits = asyncio.create_task(bench.ask())
        await asyncio.sleep(0.1)
        assert not waits.done()
    assert (await waits).startswith("first")


async def test_a_new_process_without_kept_sockets_that_dies_again_and_again_ends_the_restart(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(child_supervisor, "BACKOFF_S", (0.05,))
    bench.supervisor._sockets = {}
    with pytest.raises(ChildFailed, match="ended 3 times while starting"):
        await bench.supervisor.replace(replace(bench.child("broken"), sockets={}))


async def test_callers_wait_after_a_crash_but_not_for_a_process_that_crashes_again(
    bench: Bench, until: Any, monkeypatch: pytest.MonkeyPatch
):
    assert bench.supervisor.process is not None
    bench.supervisor.process.kill()
    bench.supervisor.process.wait()
    assert await bench.ask() == f"first {bench.started('first')[-1]}" or len(bench.started("first")) == 2
    await until(lambda: bench.states[-1] == "ready")
    bench.supervisor.child = bench.child("broken")
    bench.supervisor.process.kill()

    async def refused() -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", bench.port)
        except ConnectionError:
            return True
        writer.close()
        return False

    await until(refused)
    bench.supervisor.child = bench.child("mended")
    await until(lambda: bench.started("mended"))
    await until(lambda: bench.states[-1] == "ready")
    assert (await bench.ask()).startswith("mended")
