"""Check that a loaded model answers its samples as expected, and measure its capacity."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from typing import Any

from services.worker.adapters.sample_calls import as_json, outputs_of, repeated, request_of, rows_of
from services.worker.adapters.triton_client import TritonClient
from services.worker.adapters.warmup import batch_sizes, zeros
from services.worker.domain import capacity_card
from services.worker.domain.output_check import OutputCheck
from tidegate.kernel.errors import BadRequest, DeadlinePassed, ModelFailed, TidegateError, Unavailable
from tidegate.kernel.protocol.golden import differences, read_sample
from tidegate.kernel.protocol.models import Signature
from tidegate.kernel.protocol.verification import BatchFigures

CALL_S = 30.0
# Each batch size is measured with several callers: one for each instance of the model. A caller makes calls
# for MEASURE_S seconds. After this time, a caller with fewer than LEAST_CALLS calls continues. It stops after
# LEAST_CALLS calls, or 2 * MEASURE_S seconds after the start of the measurement.
MEASURE_S, LEAST_CALLS = 0.2, 5
_MISSING = re.compile(r"No module named|ImportError|ModuleNotFoundError")


class VersionCheck:
    """Checks and measurements of one loaded model.

    ``largest``: the maximum number of rows in a call of its Deployment. ``stateful``: True if each call
    belongs to a sequence. Then the model is called only with the given samples, and is not measured.
    """

    def __init__(
        self,
        client: TritonClient,
        model: str,
        signature: Signature,
        largest: int | None,
        *,
        stateful: bool = False,
    ) -> None:
        self._client = client
        self._model = model
        self._signature = signature
        self._largest = largest
        self._stateful = stateful
        self._request: Any = None
        self.caveat = ""

    async def check(self, samples: Sequence[dict[str, Any]]) -> None:
        """Call the model with each sample. Without samples, call it with zeros.

        Raises ModelFailed if an answer is wrong or missing. For some models, zeros are no valid input. If
        such a model rejects the zeros, set ``caveat`` and raise no error.

        A decoupled model is never called. A stateful model is called only with samples. If the model is not
        called, set ``caveat``.
        """
        if self._signature.decoupled:
            self.caveat = "The model is decoupled, so the check only loaded it and warmed it up."
            return
        for number, given in enumerate(samples, start=1):
            await self._sample(given, f"sample {number}")
        if samples:
            return
        if self._stateful:
            self.caveat = (
                "The model is stateful, so the check only loaded it. To call the model, give samples with a "
                "sequence_id."
            )
            return
        try:
            request = zeros(self._model, self._signature, 1)
            await self._outputs(request, "the sample of zeros that was made from the signature")
            self._request = request
        except ModelFailed as error:
            if _is_certain(self._signature) or _MISSING.search(error.message):
                hint = "If zeros are not a valid input, give a sample: `tidegate deploy --check FILE.json`."
                error.message = f"{error.message.rstrip()} {hint}"
                raise
            self.caveat = (
                f"The check only loaded the model, because the model rejected zeros: {error.message.strip()}"
            )

    async def measure(self, instances: int) -> list[BatchFigures]:
        """Measure calls with a few batch sizes. Return the figures of each batch size.

        The list is empty if no valid input of the model is known, or if the model is stateful.
        """
        if self._request is None or self._stateful:
            return []
        found = []
        rows = rows_of(self._request, self._signature)
        largest = max(batch_sizes(self._signature, self._largest)) if self._signature.max_batch_size else 0
        for size in capacity_card.sizes(largest):
            times = max(1, size // rows)
            request = self._request if times == 1 else repeated(self._request, times)
            try:
                found.append(await self._measured(request, rows * times, instances))
            except (BadRequest, ModelFailed, DeadlinePassed):
                break  # larger batches may be too large for the model
        return found

    async def _sample(self, given: dict[str, Any], name: str) -> None:
        try:
            sample = read_sample(given, f"The {name}")
            request = request_of(self._model, sample.request)
        except BadRequest as error:
            raise ModelFailed(error.message) from None
        found = differences(sample, as_json(await self._outputs(request, name)))
        if found:
            raise ModelFailed(f"The model gave an unexpected answer to {name}: {'; '.join(found)}.")
        self._request = self._request or request

    async def _outputs(self, request: Any, name: str) -> Any:
        try:
            answer = await self._client.infer(request, CALL_S)
        except DeadlinePassed:
            raise ModelFailed(f"The model did not answer {name} within {CALL_S:g} s.") from None
        except Unavailable:
            raise
        except TidegateError as error:
            raise ModelFailed(f"The model failed on {name}: {error.message.strip()}") from None
        outputs, check = outputs_of(answer), OutputCheck(self._signature)
        rows = rows_of(request, self._signature)
        problem = "" if check.agrees(outputs, rows) else check.last
        if problem := problem or check.missing(outputs):
            raise ModelFailed(
                f"The model's answer to {name} contradicts the signature: {problem}. Correct the model, or "
                "deploy it with a correct signature (`tidegate deploy --signature FILE.json`)."
            )
        return outputs

    async def _measured(self, request: Any, rows: int, instances: int) -> BatchFigures:
        raw, times = [request.SerializeToString()], list[float]()
        began = time.perf_counter()

        async def caller() -> None:
            calls = 0
            while (calls < LEAST_CALLS and time.perf_counter() - began < 2 * MEASURE_S) or (
                time.perf_counter() - began < MEASURE_S
            ):
                at = time.perf_counter()
                await self._client.infer_raw(raw, CALL_S)
                times.append(time.perf_counter() - at)
                calls += 1

        await asyncio.gather(*(caller() for _ in range(max(1, instances))))
        return capacity_card.figures(rows, times, time.perf_counter() - began)


def _is_certain(signature: Signature) -> bool:
    """Return True if zeros must be a valid input, because all inputs are numbers in fixed shapes."""
    return all(spec.datatype != "BYTES" and -1 not in spec.shape for spec in signature.inputs)
