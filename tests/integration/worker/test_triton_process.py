"""The start and the end of a tritonserver: nothing is left behind, however it ends."""

import asyncio
import os
import signal
import tracemalloc
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from services.worker.adapters.triton_command import TritonOptions
from services.worker.adapters.triton_install import TritonInstall
from services.worker.adapters.triton_process import SHARED_MEMORY, TritonProcess
from services.worker.adapters.warmup import zeros
from tests.conftest import PATIENCE_S
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol.models import Signature

pytestmark = pytest.mark.integration

Run = Callable[..., Awaitable[Any]]
Example = Callable[[str], tuple[Path, Signature]]


def processes_of(replica: str) -> list[int]:
    """Return every process with the replica's mark in its environment."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            environ = (entry / "environ").read_bytes() if entry.name.isdigit() else b""
        except OSError:
            continue
        if f"TIDEGATE_REPLICA={replica}".encode() in environ.split(b"\0"):
            found.append(int(entry.name))
    return found


def shared_memory(running: Any) -> list[Path]:
    return list(SHARED_MEMORY.glob(f"{running.process._region}*"))


@pytest.fixture
def identity(run: Run, example: Example) -> Callable[[], Awaitable[Any]]:
    return lambda: run("python", *example("identity"), "identity")


async def test_stop_leaves_nothing(identity: Run) -> None:
    running = await identity()
    assert len(processes_of("identity-v1-0-0")) == 2, "Triton and its Python stub"
    assert shared_memory(running)
    await running.process.stop()
    assert not processes_of("identity-v1-0-0")
    assert not shared_memory(running)
    assert not running.process.running


async def test_a_crash_is_noticed_and_the_next_start_is_clean(identity: Run, example: Example) -> None:
    running = await identity()
    ended = asyncio.create_task(running.process.wait())
    os.kill(running.process.pid, signal.SIGKILL)
    assert await asyncio.wait_for(ended, PATIENCE_S) == -signal.SIGKILL
    with pytest.raises(Unavailable, match="model server has ended"):
        await running.client.infer(zeros("identity", example("identity")[1], 1), 5)
    await running.process.stop()
    assert not shared_memory(running)
    await running.process.start()
    assert running.process.running


async def test_two_tritons_side_by_side(identity: Run, example: Example) -> None:
    first, second = await identity(), await identity()
    assert first.process.metrics_port != second.process.metrics_port
    await first.process.stop(grace_s=0)
    assert await second.client.infer(zeros("identity", example("identity")[1], 1), 5)


async def test_cancelled_while_the_model_works(run: Run, example: Example) -> None:
    running = await run("python", *example("sleep"), "sleep")
    message = zeros("sleep", example("sleep")[1], 1)
    call = asyncio.create_task(running.client.infer(message, 5))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert await running.client.infer(message, 5)


async def test_a_model_that_kills_its_process(run: Run, example: Example, tmp_path: Path) -> None:
    """Triton keeps running but answers no more calls of this model, so for callers it is gone."""
    killer = tmp_path / "model.py"
    killer.write_text(example("identity")[0].read_text().replace("x = pb", "import os; os.abort(); x = pb"))
    running = await run("python", killer, example("identity")[1])
    with pytest.raises(Unavailable, match="The model's process died"):
        await running.client.infer(zeros("m", example("identity")[1], 1), 20)
    assert running.process.running
    assert await running.client.live()


async def test_no_secret_reaches_the_model(
    run: Run, example: Example, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDEGATE_SERVICE_TOKEN", "hush")
    monkeypatch.setenv("AMQP_PASSWORD", "hush")
    running = await run("python", *example("identity"), "identity", env={"MINE": "1", "TIDEGATE_HOST": "x"})
    for pid in processes_of("identity-v1-0-0"):
        environ = Path(f"/proc/{pid}/environ").read_bytes()
        assert b"=hush" not in environ
        assert b"TIDEGATE_HOST" not in environ
        assert b"MINE=1" in environ
    assert oct((running.process.repository.parent).stat().st_mode)[-3:] == "700"


async def test_metrics_are_on_loopback(identity: Run) -> None:
    running = await identity()
    url = f"http://127.0.0.1:{running.process.metrics_port}/metrics"
    text = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=5).read().decode())
    assert 'nv_inference_request_success{model="identity"' in text


async def test_a_triton_that_cannot_start_tells_why(install: TritonInstall, tmp_path: Path) -> None:
    broken = TritonInstall(Path("/bin/false"), install.backends_dir, install.model_bin)
    process = TritonProcess(broken, tmp_path / "r", TritonOptions("r", start_timeout_s=5))
    with pytest.raises(Unavailable, match="ended while it started"):
        await process.start()
    with pytest.raises(Unavailable, match="TIDEGATE_TRITON_SERVER"):
        TritonInstall.find(tmp_path, tmp_path / "tritonserver")
    with pytest.raises(Unavailable, match="make up"):
        TritonInstall.find(tmp_path)


def test_the_end_of_a_log_is_read_and_not_all_of_it(install: TritonInstall, tmp_path: Path) -> None:
    """A sparse log can look large at no cost: one made its worker read 3 GiB."""
    process = TritonProcess(install, tmp_path, TritonOptions("m-0-1"))
    with process.log_path.open("wb") as log:
        log.seek(3 * 2**30)
        log.write(b"\nthe last words\n")
    tracemalloc.start()
    try:
        assert process.tail().endswith("the last words")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
