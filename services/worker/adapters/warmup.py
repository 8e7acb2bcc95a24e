"""Warm up a model with calls, before it gets requests."""

from __future__ import annotations

import asyncio
import contextlib
import math
from contextlib import aclosing
from typing import Any

from services.worker.adapters.triton_client import ModelInferRequest, TritonClient
from services.worker.domain.output_check import OutputCheck
from services.worker.domain.split import Output
from tidegate.kernel import telemetry
from tidegate.kernel.errors import ModelFailed, TidegateError, Unavailable
from tidegate.kernel.protocol.models import Signature
from tidegate.kernel.protocol.sequences import END, ID, START

log = telemetry.logger(__name__)

ITEM_BYTES = {
    "BOOL": 1, "UINT8": 1, "INT8": 1, "UINT16": 2, "INT16": 2, "FP16": 2, "BF16": 2,
    "UINT32": 4, "INT32": 4, "FP32": 4, "UINT64": 8, "INT64": 8, "FP64": 8,
    "BYTES": 4,  # an empty string is encoded as its length, four zero bytes
}  # fmt: skip
FIRST_ANSWER_S = 10.0
# The sequence id of the warm-up. It is very large, so that no caller's sequence is likely to have the same
# id.
WARM_UP_ID = 2**62 + 11
BYTES_LIMIT = 16 * 1024 * 1024
CALL_S = 30.0


async def warm_up(
    client: TritonClient, model: str, signature: Signature, *, max_batch: int | None = None
) -> None:
    """Call the model with zeros: first with one row, then with the largest batch.

    The largest batch has up to ``max_batch`` rows. :func:`batch_sizes` explains when the second call is
    skipped. If the model rejects the zeros, this is logged, and the warm-up ends without an error. Raises
    Unavailable if Triton is gone, and Contradiction if an answer contradicts the signature.
    """
    check = OutputCheck(signature)
    for rows in batch_sizes(signature, max_batch):
        request = zeros(model, signature, rows)
        try:
            if signature.decoupled:
                await _first_answer(client, request, FIRST_ANSWER_S)
            else:
                _verify(check, await client.infer(request, CALL_S), rows)
        except (Contradiction, Unavailable):
            raise
        except TidegateError as refusal:
            log.info(
                "the model rejected a warm-up call",
                extra={"model": model, "rows": rows, "reason": refusal.message},
            )
            return


class Contradiction(ModelFailed):
    """The error for a model's answer that contradicts the model's signature."""


def _verify(check: OutputCheck, answer: Any, rows: int) -> None:
    """Raise Contradiction if the outputs of an answer differ from the signature."""
    outputs = [Output(each.name, each.datatype, tuple(each.shape), b"") for each in answer.outputs]
    problem = "" if check.agrees(outputs, rows) else check.last
    if problem := problem or check.missing(outputs):
        raise Contradiction(
            f"The model's answer contradicts the signature: {problem}. Correct the model, or deploy it with "
            "a correct signature (`tidegate deploy --signature FILE.json`)."
        )


async def _first_answer(client: TritonClient, request: Any, timeout_s: float) -> None:
    """Wait at most ``timeout_s`` seconds for the first answer, and ignore the others.

    A decoupled model may send no answer, or may never stop sending.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s), aclosing(client.stream(request)) as answers:
            await anext(answers, None)


def batch_sizes(signature: Signature, max_batch: int | None = None) -> list[int]:
    """Return the batch sizes for the warm-up: 1, and also the largest that a call may have.

    The largest size is left out if it is 1, if an input has a variable dimension, or if the inputs would need
    too much memory. It is also left out for a model with sequences.
    """
    if signature.sequences is not None:
        return [1]  # Triton refuses more rows in a request of a sequence
    largest = min(signature.max_batch_size, max_batch or signature.max_batch_size)
    fixed = all(-1 not in tensor.shape for tensor in signature.inputs)
    row = sum(math.prod(tensor.shape) * ITEM_BYTES[tensor.datatype] for tensor in signature.inputs)
    return [1, largest] if fixed and largest > 1 and largest * row <= BYTES_LIMIT else [1]


def zeros(model: str, signature: Signature, rows: int) -> Any:
    """Return a ``ModelInferRequest`` with zeros (for BYTES: empty strings). Dims that are not fixed are 1."""
    request = ModelInferRequest(model_name=model)
    if signature.sequences is not None:  # this request is a whole sequence, so Triton keeps no state
        request.parameters[ID].int64_param = WARM_UP_ID
        request.parameters[START].bool_param = request.parameters[END].bool_param = True
    for spec in signature.inputs:
        shape = [abs(dim) for dim in spec.shape]
        if signature.max_batch_size > 0:
            shape = [rows, *shape]
        request.inputs.add(name=spec.name, datatype=spec.datatype, shape=shape)
        request.raw_input_contents.append(bytes(math.prod(shape) * ITEM_BYTES[spec.datatype]))
    return request
