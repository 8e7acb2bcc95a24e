"""Measure the precision and the speed of a quantized model in this worker's Triton.

The model's file contains the samples for the measurement.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import numpy as np

from services.worker.adapters.triton_client import ModelInferRequest, TritonClient
from services.worker.domain import precision as judging
from tidegate.kernel import telemetry
from tidegate.kernel.errors import TidegateError, Unavailable
from tidegate.kernel.precision import cpu
from tidegate.kernel.precision.embedded import Embedded
from tidegate.kernel.protocol.tensors import DATATYPES

log = telemetry.logger(__name__)

CALLS, TIMEOUT_S = 5, 30.0
_NAMES = {np.dtype(each.numpy): each.name for each in DATATYPES.values() if each.numpy}


async def measured_here(client: TritonClient, model: str, embedded: Embedded) -> str:
    """Return a text with a quantized model's loss of precision and its time per call on this CPU.

    If there are no samples, or if the model rejects them, nothing is measured. Then the text only compares
    this CPU with the CPU for which the model was quantized. Raises Unavailable if Triton has ended.
    """
    precision, here = embedded.precision, cpu.read()
    rows = len(next(iter(embedded.inputs.values()), ()))
    loss = call_ms = None
    if rows:
        try:
            loss, call_ms = await _measure(client, model, embedded)
        except Unavailable:
            raise
        except (TidegateError, ValueError, KeyError) as refusal:
            log.warning(
                "the model was not measured on this CPU", extra={"model": model, "reason": str(refusal)}
            )
    text = judging.report(precision, here, loss, rows, call_ms)
    report = log.warning if "WARNING" in text else log.info
    report("the precision of the model on this CPU", extra={"model": model, "cpu": here.name, "result": text})
    return text


async def _measure(client: TritonClient, model: str, embedded: Embedded) -> tuple[float | None, float]:
    request = ModelInferRequest(model_name=model)
    for name, array in embedded.inputs.items():
        request.inputs.add(name=name, datatype=_NAMES[array.dtype], shape=array.shape)
        request.raw_input_contents.append(np.ascontiguousarray(array).tobytes())
    times, answer = [], None
    for _ in range(CALLS):
        began = time.perf_counter()
        answer = await client.infer(request, TIMEOUT_S)
        times.append((time.perf_counter() - began) * 1e3)
    return judging.loss_here(embedded.precision, embedded.outputs, _arrays(answer)), median(times)


def _arrays(answer: Any) -> dict[str, Any]:
    found = {}
    for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True):
        kind = next((dtype for dtype, name in _NAMES.items() if name == output.datatype), None)
        if kind is not None:
            found[output.name] = np.frombuffer(raw, kind).reshape(tuple(output.shape))
    return found
