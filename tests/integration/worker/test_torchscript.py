"""TorchScript on the real Triton, with the torch of the models' environment: see `make test-torch`."""

import asyncio
import subprocess
import time
import zipfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.worker.adapters import model_device
from services.worker.adapters.triton_install import TritonInstall
from services.worker.adapters.warmup import warm_up
from tests.conftest import Figure, MadeOnce
from tests.integration.worker.test_triton_models import ask, request
from tidegate.kernel.errors import ModelFailed
from tidegate.kernel.protocol.models import Signature, TensorSpec

pytestmark = [pytest.mark.integration, pytest.mark.torch]

Run = Callable[..., Awaitable[Any]]
X = TensorSpec(name="x", datatype="FP32", shape=[8])
Y = TensorSpec(name="y", datatype="FP32", shape=[4])
SIZE = TensorSpec(name="size", datatype="FP32", shape=[1])
NET = Signature(inputs=[X], outputs=[Y], max_batch_size=32)
TWO = Signature(inputs=[X], outputs=[Y, SIZE], max_batch_size=32)
DIRECTORY = """
name: "m" platform: "pytorch_libtorch" max_batch_size: 32
input [ { name: "x" data_type: TYPE_FP32 dims: [ 8 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ 4 ] } ]
dynamic_batching { max_queue_delay_microseconds: 100000 preferred_batch_size: [ 32 ] }
"""
MAKE = """
import sys, numpy as np, torch
from typing import Dict, Tuple

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
        self.dropout = torch.nn.Dropout(0.5)
    def forward(self, x):
        if bool((x > 1000).any()):
            raise ValueError("too large")
        return self.dropout(self.layers(x))

class Two(torch.nn.Module):
    def __init__(self, net: Net):
        super().__init__()
        self.net = net
    def forward(self, x) -> Tuple[torch.Tensor, torch.Tensor]:
        return self.net(x), x.abs().sum(dim=1, keepdim=True)

class Named(torch.nn.Module):
    def __init__(self, net: Net):
        super().__init__()
        self.net = net
    def forward(self, x) -> Dict[str, torch.Tensor]:
        return {"size": x.abs().sum(dim=1, keepdim=True), "y": self.net(x)}

torch.manual_seed(1); torch.set_num_threads(1)
net, folder = Net(), sys.argv[1]
# Saved in training mode: the server has to turn dropout off.
for name, module in (("net", net), ("two", Two(net)), ("named", Named(net))):
    torch.jit.script(module).save(f"{folder}/{name}.pt")
torch.save(net.state_dict(), f"{folder}/weights.pt")
x = torch.randn(32, 8)
with torch.inference_mode():
    size = x.abs().sum(dim=1, keepdim=True)
    np.savez(f"{folder}/expected.npz", x=x.numpy(), y=net.eval()(x).numpy(), size=size)
"""


@pytest.fixture(scope="session")
def torch_models(install: TritonInstall, made_once: MadeOnce) -> Path:
    """Make TorchScript files and torch's own answers, with the models' torch."""
    if not install.has_module("torch"):
        pytest.skip("torch is not in the models' environment; `make test-torch` installs it")

    def make(folder: Path) -> None:
        # TorchScript is compiled from the source in a file.
        script = folder / "make.py"
        script.write_text(MAKE)
        subprocess.run([install.python, script, folder], check=True, timeout=120)

    return made_once("torch-models", make)


@pytest.fixture
def expected(torch_models: Path) -> dict[str, Any]:
    with np.load(torch_models / "expected.npz") as file:
        return dict(file)


async def test_answers_equal_torch_in_process(
    run: Run, torch_models: Path, expected: dict[str, Any], figure: Figure
) -> None:
    began = time.perf_counter()
    running = await run("torchscript", torch_models / "net.pt", NET)
    await warm_up(running.client, "m", NET)
    loaded_s = time.perf_counter() - began
    assert await running.client.signature("m") == NET
    assert await model_device.read_device(running.client, ["m"]) == "cpu"
    one_by_one = [await ask(running.client, request("m", "x", row[None])) for row in expected["x"]]
    batch = await ask(running.client, request("m", "x", expected["x"]))
    for y in (np.concatenate([answer["y"] for answer in one_by_one]), batch["y"]):
        np.testing.assert_allclose(y, expected["y"], rtol=0, atol=1e-6)
    began = time.perf_counter()
    for _ in range(200):
        await ask(running.client, request("m", "x", expected["x"][:1]))
    each_ms = (time.perf_counter() - began) / 200 * 1e3
    figure(f"TorchScript: Triton and model up in {loaded_s:.2f} s, one call {each_ms:.2f} ms")


@pytest.mark.parametrize("file", ["two.pt", "named.pt"])
async def test_several_outputs_in_order_or_by_name(
    run: Run, torch_models: Path, expected: dict[str, Any], file: str
) -> None:
    running = await run("torchscript", torch_models / file, TWO)
    answer = await ask(running.client, request("m", "x", expected["x"]))
    for name in ("y", "size"):
        np.testing.assert_allclose(answer[name], expected[name], rtol=0, atol=1e-5)
    only = await ask(running.client, request("m", "x", expected["x"], ("size",)))
    assert list(only) == ["size"]


async def test_requests_that_come_together_share_a_call(
    run: Run, torch_models: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    """A Triton directory for the pytorch backend, which Tidegate's runtime replaces."""
    path = tmp_path / "model.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("m/config.pbtxt", DIRECTORY)
        file.write(torch_models / "net.pt", "m/1/model.pt")
    running = await run("triton", path, None)
    rows = [expected["x"][i : i + 1] for i in range(16)]
    bad = np.full((1, 8), 2000, "f4")
    calls = [ask(running.client, request("m", "x", x)) for x in [*rows, bad]]
    *answers, failure = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(failure, ModelFailed)
    assert "too large" in failure.message
    together = np.concatenate([answer["y"] for answer in answers])  # type: ignore[index]
    np.testing.assert_allclose(together, expected["y"][:16], rtol=0, atol=1e-6)
    statistics = await running.client.statistics("m")
    assert statistics.execution_count < 17, "they came together"


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lambda models: b"not a model", "PytorchStreamReader|file in archive|zip archive"),
        (lambda models: (models / "net.pt").read_bytes()[:3000], "PytorchStreamReader|zip archive"),
        (lambda models: (models / "weights.pt").read_bytes(), "constants.pkl|TorchScript|code"),
    ],
    ids=["no archive", "cut off", "weights alone"],
)
async def test_a_broken_file_fails_the_load_with_torchs_words(
    run: Run, torch_models: Path, tmp_path: Path, broken: Callable[[Path], bytes], words: str
) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(broken(torch_models))
    with pytest.raises(ModelFailed, match=words):
        await run("torchscript", path, NET)


async def test_a_signature_with_other_outputs_than_the_module_gives(
    run: Run, torch_models: Path, expected: dict[str, Any]
) -> None:
    running = await run("torchscript", torch_models / "two.pt", NET)
    with pytest.raises(ModelFailed, match=r"returned 2 tensors, but the model's outputs are \['y'\]"):
        await ask(running.client, request("m", "x", expected["x"][:1]))
