"""Loads a replica's models into its Triton, on the GPUs that it holds, and remembers where they run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from services.worker.adapters import devices
from services.worker.adapters.triton_client import TritonClient
from services.worker.domain import load_failures
from services.worker.domain.devices import Devices, held
from tidegate.kernel import telemetry
from tidegate.kernel.errors import ModelFailed
from tidegate.kernel.protocol.models import Deployment

log = telemetry.logger(__name__)

LONGEST_REASON = 300
_NO_GPU = ("invalid or unsupported gpu id", "no GPUs are available")


class ModelLoader:
    """``write`` writes the model repository for these GPUs, and without any for the CPU; it blocks.

    ``device`` is where the models run, empty until they are loaded; ``caveat`` says why that is not the GPU.
    """

    def __init__(self, deployment: Deployment, write: Callable[[Devices], list[str]]) -> None:
        self._deployment = deployment
        self._write = write
        self.device = ""
        self.caveat = ""

    async def prepare(self) -> list[str]:
        """Write the model repository and return the models to load, in order. Raises ModelFailed."""
        return await asyncio.to_thread(self._write, held(self._deployment.resources))

    async def load(self, client: TritonClient, models: Sequence[str], tail: Callable[[], str]) -> None:
        """Load the models; on the CPU if they cannot use their GPU and the Deployment allows that.

        ``tail`` returns the end of Triton's log. Raises ModelFailed.
        """
        try:
            await self._load(client, models, tail)
        except ModelFailed as error:
            resources = self._deployment.resources
            if not (held(resources) and resources.allow_cpu) or self.caveat:
                raise
            log.warning("the model runs on the CPU instead of its GPU", extra={"problem": error.message})
            reason = error.message.strip().partition("\n")[0][:LONGEST_REASON]
            self.caveat = f"runs on the CPU, as allow_cpu says; on the GPU it failed: {reason}"
            await asyncio.to_thread(self._write, ())
            await self._load(client, models, tail)
        self.device = await devices.of(client, models)

    async def _load(self, client: TritonClient, models: Sequence[str], tail: Callable[[], str]) -> None:
        for model in models:
            try:
                await client.load(model, self._deployment.start_timeout_s)
            except ModelFailed as error:
                raise ModelFailed(self._explained(error.message, tail)) from None

    def _explained(self, message: str, tail: Callable[[], str]) -> str:
        if "not healthy" in message:
            return load_failures.ended(self._deployment.name, tail())
        gpus = len(held(self._deployment.resources))
        if gpus and any(words in message for words in _NO_GPU):
            return (
                f"This replica has {gpus} GPU(s), but its Triton finds fewer, or none that it can use. "
                "Check `nvidia-smi` and the driver's version, or let the model run on the CPU: "
                f"`--resource allow_cpu=1`. Triton says: {message.strip()}"
            )
        return load_failures.explained(message)
