"""A model beyond its memory limit, on the real Triton: it is killed, and its host is safe."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from services.worker.adapters import memory_limit
from services.worker.adapters.memory_limit import MemoryLimit
from services.worker.adapters.model import Model
from services.worker.application.model_watchdog import ModelWatchdog
from services.worker.domain.deaths import Death
from tests.integration.worker.conftest import ROOT, Run
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol.envelope import Request, call_key, read_request, request_frame, tensor
from tidegate.kernel.protocol.models import Signature, TensorSpec

pytestmark = pytest.mark.integration

DEATHS = ROOT / "benchmarks" / "models" / "deaths" / "model.py"
SIGNATURE = Signature(
    inputs=[TensorSpec(name="x", datatype="FP32", shape=[1])],
    outputs=[TensorSpec(name="y", datatype="FP32", shape=[1])],
    max_batch_size=8,
)
LEAK = 3000.0
LIMIT_MB = 512


def request(number: float) -> Request:
    key = call_key((tensor("x", "FP32", (1,)),), (), {})
    return read_request(request_frame(os.urandom(16), 1, 1, key, [np.array([[number]], "<f4").tobytes()]))


@pytest.fixture(params=["a cgroup", "watched"])
def held_by(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Limit the first Triton of the test in this way."""
    way: str = request.param
    folder = tmp_path / "replica-0"
    folder.mkdir()
    (folder / memory_limit.LIMIT_FILE).write_text(str(LIMIT_MB))
    if way == "watched":
        nothing = tmp_path / "no-cgroups"
        monkeypatch.setattr(
            memory_limit, "read_limit", lambda at, name: MemoryLimit(LIMIT_MB, name, at / "note", nothing)
        )
    else:
        probe = MemoryLimit(LIMIT_MB, "tidegate-probe", tmp_path / "probe")
        probe.open()
        if probe.group is None:
            pytest.skip(f"no cgroup can be created here: {probe.description}")
        probe.group.rmdir()
    return way


async def test_a_model_beyond_its_limit_is_ended_and_says_why(run: Run, tmp_path: Path, held_by: str) -> None:
    (tmp_path / "model.py").write_bytes(DEATHS.read_bytes())
    running = await run("python", tmp_path / "model.py", SIGNATURE)
    model = Model(running.client, running.model, SIGNATURE.outputs)
    assert (await model.call([request(2.0)], 20)).outputs[0].raw == np.array([[4.0]], "<f4").tobytes()
    assert running.process.memory_limit.startswith(f"{LIMIT_MB} MiB, ")
    assert held_by in running.process.memory_limit
    assert not running.process.ran_out_of_memory
    noted = tmp_path / "replica-0" / memory_limit.GROUP_FILE
    group = Path(noted.read_text()) if held_by == "a cgroup" else None

    died: list[Death] = []
    watch = ModelWatchdog(240.0, died.append)
    watch.start(running.process, model)
    with pytest.raises(Unavailable):
        await model.call([request(LEAK)], 240)
    await running.process.wait()
    assert running.process.ran_out_of_memory
    assert [death.description for death in died] == ["the model's process ended (signal 9, out of memory)"]
    assert f"the model reached its limit of {LIMIT_MB} MiB" in running.process.tail()
    await watch.stop()

    await running.process.stop(grace_s=0)
    assert group is None or not group.exists()
    await running.process.start()
    assert not running.process.ran_out_of_memory, "that was the former one"
    if group is not None:
        assert str(running.process.pid) in (group / "cgroup.procs").read_text().split()
