"""The GPUs of the engine's machine, listed by `nvidia-smi` in a container."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from services.autoscaler.adapters.docker.container_spec import STACK, DockerPlan
from services.autoscaler.adapters.docker.engine import Engine, EngineError
from services.autoscaler.adapters.process.gpu_inventory import PROBE_TIMEOUT_S, RETRY_AFTER_S
from services.autoscaler.domain.gpus import QUERY, Gpu, read_inventory
from services.autoscaler.domain.launcher import NoFreeGpu
from tidegate.kernel import telemetry
from tidegate.kernel.errors import Unavailable

log = telemetry.logger(__name__)


class EngineGpus:
    """The GPUs of the container engine's machine.

    The autoscaler's own container has no GPU. So `nvidia-smi` runs in a container with access to all GPUs.
    The list is read once. If it is empty, it is read again after a minute.
    """

    def __init__(self, engine: Engine, plan: DockerPlan, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._plan = plan
        self._clock = clock
        self._found: tuple[Gpu, ...] = ()
        self._problem: Unavailable | None = None
        self._not_before = 0.0

    async def gpus(self) -> tuple[Gpu, ...]:
        """Return the GPUs.

        Raise ``NoFreeGpu`` if the machine has no GPU or no driver. Raise ``Unavailable`` if the engine does
        not answer.
        """
        if not self._found and self._clock() >= self._not_before:
            self._not_before = self._clock() + RETRY_AFTER_S
            self._problem = None
            try:
                self._found = read_inventory(await self._probe())
            except Unavailable as error:
                self._problem = error
                log.warning("GPUs cannot be listed", extra={"problem": error.message})
        if self._problem is not None:
            # If the engine answers with an error, the host has no GPU or no driver.
            answered = isinstance(self._problem, EngineError | NoFreeGpu)
            message = f"The engine's GPUs cannot be listed: {self._problem.message}"
            raise NoFreeGpu(message) if answered else Unavailable(message)
        return self._found

    async def _probe(self) -> str:
        name = self._plan.name("gpu-probe")
        await self._engine.remove(name)
        await self._engine.create(name, probe_body(self._plan))
        try:
            await self._engine.start(name)
            code = await self._engine.wait(name, PROBE_TIMEOUT_S)
            output = await self._engine.output(name, 100)
        finally:
            with contextlib.suppress(Unavailable):
                await self._engine.remove(name)
        if code != 0:
            raise NoFreeGpu(f"nvidia-smi exited with code {code}: {output.strip()[-300:]}")
        return output


def probe_body(plan: DockerPlan) -> dict[str, object]:
    """Return the request that creates a container in which `nvidia-smi` lists the GPUs."""
    return {
        "Image": plan.image,
        "Entrypoint": ["nvidia-smi"],
        "Cmd": QUERY,
        "Labels": {STACK: plan.stack},
        "HostConfig": {
            "NetworkMode": "none",
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges"],
            "LogConfig": {"Type": "json-file", "Config": {}},
            "DeviceRequests": [{"Driver": "nvidia", "Count": -1, "Capabilities": [["gpu", "utility"]]}],
        },
    }
