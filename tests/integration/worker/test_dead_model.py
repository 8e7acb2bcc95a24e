"""A Python model whose process dies: Triton stays up and never starts another, so only a new Triton helps."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from services.worker.adapters.model import Model
from services.worker.adapters.model_processes import model_processes
from services.worker.application.model_watchdog import ModelWatchdog
from services.worker.domain.deaths import Death
from tests.conftest import PATIENCE_S
from tests.integration.worker.conftest import ROOT, Run
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol.envelope import Request, call_key, read_request, request_frame, tensor
from tidegate.kernel.protocol.models import Signature, TensorSpec

pytestmark = pytest.mark.integration

KILLER = ROOT / "benchmarks" / "models" / "killer" / "model.py"
DEATHS = ROOT / "benchmarks" / "models" / "deaths" / "model.py"
SIGNATURE = Signature(
    inputs=[TensorSpec(name="x", datatype="FP32", shape=[1])],
    outputs=[TensorSpec(name="y", datatype="FP32", shape=[1])],
    max_batch_size=8,
)
SEGFAULT = 1000.0


def request(number: float) -> Request:
    key = call_key((tensor("x", "FP32", (1,)),), (), {})
    return read_request(request_frame(os.urandom(16), 1, 1, key, [np.array([[number]], "<f4").tobytes()]))


async def test_the_death_of_the_models_process_is_a_loss_of_the_server(run: Run, tmp_path: Path) -> None:
    """Triton would fail every later request with the model's error."""
    (tmp_path / "model.py").write_bytes(KILLER.read_bytes())
    running = await run("python", tmp_path / "model.py", SIGNATURE)
    model = Model(running.client, running.model, SIGNATURE.outputs)
    assert (await model.call([request(2.0)], 20)).outputs[0].raw == np.array([[4.0]], "<f4").tobytes()
    assert running.client.model_died is False
    for number in (SEGFAULT, 1.0):
        with pytest.raises(Unavailable, match="model's process died"):
            await model.call([request(number)], 20)
    assert running.client.model_died is True
    assert await running.client.live(), "Triton itself says that all is well"


@pytest.mark.parametrize(
    ("number", "sent", "words"),
    [
        (None, signal.SIGKILL, "the model's process ended (signal 9, out of memory?)"),
        (None, signal.SIGSTOP, "the model's process was ended: a signal (SIGSTOP) had stopped the process"),
        (1000.0, None, "the model's process ended (exit code 7)"),
        (2000.0, None, "the model's process was ended: no call was answered for 1 s"),
    ],
)
async def test_the_worker_sees_that_the_models_process_is_of_no_use(
    run: Run, tmp_path: Path, number: float | None, sent: signal.Signals | None, words: str
) -> None:
    """Triton reports nothing while nobody calls the model."""
    (tmp_path / "model.py").write_bytes(DEATHS.read_bytes())
    running = await run("python", tmp_path / "model.py", SIGNATURE)
    model = Model(running.client, running.model, SIGNATURE.outputs)
    died: list[Death] = []
    watch = ModelWatchdog(1.0, died.append, lambda: [60.0] if number == 2000.0 else [])
    watch.start(running.process, model)
    call = None
    if sent is not None:
        names = {pid: Path(f"/proc/{pid}/comm").read_text() for pid in running.process.descendants()}
        (pid,) = [pid for pid, name in names.items() if name.startswith("triton_python")]
        os.kill(pid, sent)
    else:
        assert number is not None
        call = asyncio.create_task(model.call([request(number)], 60))
    code = await asyncio.wait_for(running.process.wait(), PATIENCE_S)
    if call is not None:
        with pytest.raises(Unavailable):
            await call
    assert [death.description for death in died] == [words]
    assert watch.record_death(code) == 0.0, "the first death"
    assert watch.last is not None
    assert (watch.last.words, watch.last.total) == (words, 1)
    await watch.stop()


async def test_the_process_of_an_unloaded_model_ends_and_is_not_taken_for_the_next_one(
    run: Run, tmp_path: Path
) -> None:
    """A scratch replica unloads its model before it becomes a replica, which loads and watches it again."""
    (tmp_path / "model.py").write_bytes(DEATHS.read_bytes())
    running = await run("python", tmp_path / "model.py", SIGNATURE)
    triton = running.process
    first = model_processes(triton.pid, triton.descendants())
    assert len(first) == 1
    await running.client.unload(running.model, 20)
    async with asyncio.timeout(PATIENCE_S):
        while model_processes(triton.pid, triton.descendants()):
            await asyncio.sleep(0.01)
    await running.client.load(running.model, 60)
    died: list[Death] = []
    watch = ModelWatchdog(None, died.append, list)
    model = Model(running.client, running.model, SIGNATURE.outputs)
    watch.start(triton, model)
    second = model_processes(triton.pid, triton.descendants())
    assert len(second) == 1
    assert second != first
    await model.call([request(2.0)], 20)
    watch.check()
    assert not died
    await watch.stop()
