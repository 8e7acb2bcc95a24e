"""The GPUs of this machine, as `nvidia-smi` lists them."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

from services.autoscaler.domain.gpus import QUERY, Gpu, read_inventory, visible
from services.autoscaler.domain.launcher import NoFreeGpu
from tidegate.kernel import telemetry

log = telemetry.logger(__name__)

PROBE_TIMEOUT_S = 60.0
RETRY_AFTER_S = 60.0


class MachineGpus:
    """The GPUs of this machine that ``CUDA_VISIBLE_DEVICES`` of the autoscaler allows.

    The list is read once. If it is empty, it is read again after a minute.
    """

    def __init__(self, command: str = "nvidia-smi", clock: Callable[[], float] = time.monotonic) -> None:
        self._command = command
        self._clock = clock
        self._found: tuple[Gpu, ...] = ()
        self._problem = ""
        self._not_before = float("-inf")

    async def gpus(self) -> tuple[Gpu, ...]:
        """Return the GPUs that replicas may use. Raise ``NoFreeGpu`` if none was found."""
        if not self._found and self._clock() >= self._not_before:
            self._not_before = self._clock() + RETRY_AFTER_S
            self._found, self._problem = await self._read()
        if not self._found:
            raise NoFreeGpu(
                f"This host has no GPU: {self._problem} Deploy without `gpus` and `gpu_memory_mb`, "
                "or start the stack on a host with an NVIDIA GPU and its driver."
            )
        return self._found

    async def _read(self) -> tuple[tuple[Gpu, ...], str]:
        """Return the GPUs and an empty string. Without GPUs, return an empty tuple and the reason."""
        code, output = await _run([self._command, *QUERY])
        if code is None:
            return (), f"{output}."
        if code != 0:
            return (), f"{self._command} exited with code {code}: {output.strip()[-300:]}."
        setting = os.environ.get("CUDA_VISIBLE_DEVICES")
        listed = read_inventory(output)
        found = visible(listed, setting)
        if found:
            log.info("GPUs of this host", extra={"gpus": [f"{gpu.uuid} {gpu.name}" for gpu in found]})
        if listed and not found:
            return (), f"CUDA_VISIBLE_DEVICES={setting!r} in the stack's environment excludes all GPUs."
        return found, "" if found else f"{self._command} lists none."


async def _run(command: list[str]) -> tuple[int | None, str]:
    """Return the exit code and output of a command.

    If the command cannot start, or does not end in time, return None and the reason.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
    except OSError as error:
        return None, f"{command[0]} cannot be run ({error.strerror})"
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            output, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        return None, f"{command[0]} did not answer within {PROBE_TIMEOUT_S:g} s"
    return process.returncode, output.decode(errors="replace")
