"""Read facts about a language model's engine every second: its requests, KV cache and tokens."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import orjson

from services.worker.adapters import metrics
from services.worker.adapters.model import Model
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.errors import TidegateError
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.llm import EVENTS, REQUEST, LlmRequest
from tidegate.kernel.protocol.presence import EngineReport
from tidegate.kernel.protocol.tensors import pack_strings, unpack_strings

log = telemetry.logger(__name__)

EVERY_S = 1.0
SLOW_S = 5.0
PATH = "/tidegate/stats"

_KEY = envelope.call_key((envelope.tensor(REQUEST, "BYTES", (1,)),), (), {})


class EngineFacts:
    """The facts that an engine reported last.

    ``report`` is None before the first reading, after the loss of the model, and for models that are not
    language models.
    """

    def __init__(self) -> None:
        self._model: Model | None = None
        self._task: asyncio.Task[None] | None = None
        self._before = EngineReport()
        self.report: EngineReport | None = None

    def use(self, model: Model) -> None:
        """Start to read the facts of an engine that was just loaded."""
        self._model = model
        # A new engine's totals begin at zero.
        self._before = EngineReport()
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="engine facts")

    def lose(self) -> None:
        """Stop reading, because the model was lost."""
        self._model = self.report = None

    async def stop(self) -> None:
        """Stop reading."""
        await tasks.end(self._task)

    async def _run(self) -> None:
        while True:
            model = self._model
            if model is not None:
                try:
                    async with asyncio.timeout(SLOW_S):
                        found = EngineReport.of(await _read(model))
                except (TidegateError, TimeoutError, ValueError, KeyError, IndexError) as error:
                    log.debug("the engine did not report its facts", extra={"problem": repr(error)})
                else:
                    if model is self._model:
                        metrics.count_engine(self._before, found)
                        self._before = self.report = found
            await asyncio.sleep(EVERY_S)


async def _read(model: Model) -> dict[str, object]:
    data: list[envelope.Buffer] = [pack_strings([LlmRequest(PATH, {}).to_bytes()])]
    request = envelope.Request(b"", 0, 0, 1, 0, b"", b"", _KEY, data, b"")
    # An engine that hangs can still report its facts. So do not count these answers: they would tell the
    # watchdog that the model works.
    async with aclosing(model.stream(request, counted=False)) as answers:
        async for answer in answers:
            for output in answer.outputs:
                if output.name == EVENTS:
                    found: dict[str, object] = orjson.loads(unpack_strings(output.raw)[0])
                    return found
    raise KeyError(EVENTS)
