"""Run a contained model as a worker does, as any user: ``python -m ... FOLDER RUNTIME``.

Makes a state folder with secrets, an environment with a requirement, a real Triton with the hostile model.
Prints what the model could do, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from services.worker.adapters.environments import Environments
from services.worker.adapters.host_cache import HostCache
from services.worker.adapters.model import Model
from services.worker.adapters.model_repository import prepare
from services.worker.adapters.sandbox import Sandbox
from services.worker.adapters.shared_memory import Regions
from services.worker.adapters.triton_client import TritonClient
from services.worker.adapters.triton_command import TritonOptions
from services.worker.adapters.triton_install import TritonInstall
from services.worker.adapters.triton_process import TritonProcess
from tests.integration.worker.hostile import MODEL
from tidegate.kernel.protocol.envelope import Buffer, call_key, read_request, request_frame, tensor
from tidegate.kernel.protocol.models import DeploymentSpec, Signature, TensorSpec, Version
from tidegate.kernel.protocol.tensors import pack_strings, unpack_strings

ROOT = Path(__file__).parents[3]
REPLICA, OTHER = "hostile-v1-0-1", "victim-v1-0-1"
# The model of the attacks has a large tensor too, which goes through shared memory.
LARGE = 500_000
SIGNATURE = Signature(
    inputs=[
        TensorSpec(name="order", datatype="BYTES", shape=[1]),
        TensorSpec(name="large", datatype="FP32", shape=[LARGE]),
    ],
    outputs=[
        TensorSpec(name="said", datatype="BYTES", shape=[1]),
        TensorSpec(name="doubled", datatype="FP32", shape=[LARGE]),
    ],
    max_batch_size=1,
)
ANSWER = 'return pb_utils.InferenceResponse([pb_utils.Tensor("said", said)])'
BOTH = """import tidepool
        large = pb_utils.get_input_tensor_by_name(request, "large").as_numpy()
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor("said", said), pb_utils.Tensor("doubled", large * tidepool.DEPTH)])"""
VERSION = Version(
    model="hostile", number=1, format="python", artifact_sha256="0" * 64, artifact_size=1,
    filename="model.py", signature=SIGNATURE, created_at=datetime.now(UTC), requirements=["tidepool"],
)  # fmt: skip


def secrets(state: Path) -> None:
    """Create what a stack keeps in its state folder, with careless modes."""
    for name in ("token", "webhook-secret", "data/registry.db", f"replicas/{OTHER}/assignment.json"):
        (state / name).parent.mkdir(parents=True, exist_ok=True)
        (state / name).write_text("secret")
        (state / name).chmod(0o600)
    state.chmod(0o700)


async def main(folder: Path, runtime: Path) -> dict[str, Any]:
    state = folder / "state"
    work = state / "replicas" / REPLICA
    work.mkdir(parents=True)
    secrets(state)
    artifact = state / "cache" / "artifact"
    artifact.parent.mkdir(mode=0o700)
    artifact.write_text(MODEL.replace(ANSWER, BOTH))
    artifact.chmod(0o444)
    region = Path(f"/dev/shm/tidegate-test-{os.getpid()}")
    region.write_text("secret")
    region.chmod(0o600)
    sandbox = Sandbox("required", state, note=work / "model-user")
    install = TritonInstall.find(runtime)
    links = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder / "wheels")}
    environments = Environments(HostCache(state / "cache"), install, lambda _: None, sandbox)
    layered = await environments.provide(VERSION.requirements, links, 300)
    options = TritonOptions(REPLICA, env={"MINE": "1", "LD_PRELOAD": str(folder / "spy.so")})
    process = TritonProcess(layered, work / "triton", options, sandbox)
    spec = DeploymentSpec(name="hostile-v1", model="hostile", version=1)
    models = prepare(VERSION, spec, artifact, process.repository, layered, symlinks=not sandbox.mounts)
    assert layered.model_bin is not None
    environment = layered.model_bin.parent
    (module,) = environment.glob("lib/python3*/site-packages/tidepool.py")
    placed = process.repository / "hostile" / "1" / "model.py"
    order = {
        "worker": os.getpid(),
        "up": "../../../..",
        "read": {
            "token": str(state / "token"), "webhook secret": str(state / "webhook-secret"),
            "database": str(state / "data/registry.db"), "region": str(region),
            "assignment": str(state / "replicas" / OTHER / "assignment.json"),
            "cache through /proc": f"/proc/{os.getpid()}/root{state}/token",
        },
        "write": {
            "own model": str(placed), "new beside the model": str(placed.with_name("new.py")),
            "artifact": str(artifact), "new in the cache": str(state / "cache" / "new"),
            "module": str(module), "new in the environment": str(module.with_name("new.pth")),
            "environment is whole": str(environment.with_suffix(".ok")),
            "new in the state folder": str(state / "new"), "log": str(process.log_path),
        },
        "list": {
            "state": str(state), "replicas": str(state / "replicas"), "cache": str(state / "cache"),
            "environments": str(state / "cache" / "envs"), "shared memory": "/dev/shm",
        },
        "chmod": {"chmod of the model": str(placed), "chmod of a module": str(module)},
    }  # fmt: skip
    try:
        await process.start()
        client = TritonClient(process.target, process.http)
        await client.load(models[-1], 300)
        regions = Regions(client, process.region, process.shared_memory, sandbox.user)
        model = Model(client, models[-1], SIGNATURE.outputs, regions, 1000)
        found = await attacks(model, order)
        modes = {name: oct(path.stat().st_mode & 0o777) for name, path in
                 {"artifact": artifact, "module": module, "log": process.log_path}.items()}  # fmt: skip
        await regions.close()
        await client.close()
    finally:
        tail = process.tail()
        await process.stop(grace_s=0)
        region.unlink()
    left = [path.name for path in Path("/dev/shm").glob(f"{process.region}*")]
    return {"degree": sandbox.degree, "found": found, "left": left, "modes": modes, "tail": tail}


async def attacks(model: Model, order: dict[str, Any]) -> dict[str, Any]:
    """Send the order and a large tensor. The model multiplies the tensor by the package's number."""
    key = call_key((tensor("order", "BYTES", (1,)), tensor("large", "FP32", (LARGE,))), (), {})
    large = np.arange(LARGE, dtype=np.float32)
    data: list[Buffer] = [pack_strings([json.dumps(order)]), large.tobytes()]
    frame = request_frame(os.urandom(16), 1, 1, key, data, flags=1)
    said, doubled = (await model.call([read_request(memoryview(frame))], 300)).outputs
    assert (np.frombuffer(doubled.raw, np.float32) == 3 * large).all()
    found: dict[str, Any] = json.loads(unpack_strings(said.raw)[0])
    return found


if __name__ == "__main__":
    # As in a worker, whose loop lets a child inherit more than asyncio's own does.
    print(json.dumps(uvloop.run(main(Path(sys.argv[1]), Path(sys.argv[2])))))
