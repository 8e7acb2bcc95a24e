"""Loads a replica's models into its Triton, on the replica's GPUs or on the CPU."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from services.worker.adapters import model_device
from services.worker.adapters.triton_client import TritonClient
from services.worker.domain import load_failures
from services.worker.domain.devices import GpuNumbers, replica_gpus
from tidegate.kernel import telemetry
from tidegate.kernel.errors import ModelFailed
from tidegate.kernel.protocol.models import Deployment

log = telemetry.logger(__name__)

MAX_REASON = 300
_NO_GPU = ("invalid or unsupported gpu id", "no GPUs are available")


class ModelLoader:
    """Loads models. If the GPU fails and the Deployment permits the CPU, loads them on the CPU.

    ``write`` writes the model repository for the given GPUs. If no GPU is given, it writes the repository for
    the CPU. ``write`` blocks the calling thread. ``device`` says where the models run; it is empty until they
    are loaded. ``caveat`` says why the models do not run on the GPU.
    """

    def __init__(self, deployment: Deployment, write: Callable[[GpuNumbers], list[str]]) -> None:
        self._deployment = deployment
        self._write = write
        self.device = ""
        self.caveat = ""

    async def prepare(self) -> list[str]:
        """Write the model repository. Return the models in the order in which to load them.

        Raises ModelFailed.
        """
        return await asyncio.to_thread(self._write, replica_gpus(self._deployment.resources))

    async def load(self, client: TritonClient, models: Sequence[str], tail: Callable[[], str]) -> None:
        """Load the models. If the GPU fails and the Deployment permits the CPU, load them on the CPU.

        ``tail`` returns the end of Triton's log. Raises ModelFailed if a model cannot be loaded.
        """
        try:
            await self._load(client, models, tail)
        except ModelFailed as error:
            resources = self._deployment.resources
            if not (replica_gpus(resources) and resources.allow_cpu) or self.caveat:
                raise
            log.warning("the model runs on the CPU instead of its GPU", extra={"problem": error.message})
            reason = error.message.strip().partition("\n")[0][:MAX_REASON]
            self.caveat = f"runs on the CPU (allow_cpu permits this), because the GPU failed: {reason}"
            await asyncio.to_thread(self._write, ())
            await self._load(client, models, tail)
        self.device = await model_device.read_device(client, models)

    async def _load(self, client: TritonClient, models: Sequence[str], tail: Callable[[], str]) -> None:
        for model in models:
            try:
                await client.load(model, self._deployment.start_timeout_s)
            except ModelFailed as error:
                raise ModelFailed(self._explain(error.message, tail)) from None

    def _explain(self, message: str, tail: Callable[[], str]) -> str:
        """Return the likely cause of a failed load, with a remedy."""
        if "not healthy" in message:
            return load_failures.explain_death(self._deployment.name, tail())
        gpus = len(replica_gpus(self._deployment.resources))
        if gpus and any(words in message for words in _NO_GPU):
            return (
                f"This replica has {gpus} GPU(s), but its Triton cannot find or use all of them. "
                "Check `nvidia-smi` and the driver's version, or let the model run on the CPU: "
                f"`--resource allow_cpu=1`. Triton says: {message.strip()}"
            )
        return load_failures.explain(message)
