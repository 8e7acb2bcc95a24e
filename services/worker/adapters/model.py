"""Call one model of a Triton.

Requests with the same call key are sent as one batch. A call key consists of the requested outputs, the
parameters, and the name, datatype and dims of each input tensor. It does not contain the tensors' data, and
this module does not parse the data.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import TypeVar

from services.worker.adapters import grpc_messages, http_messages
from services.worker.adapters.metrics import CONTRADICTIONS
from services.worker.adapters.model_call import ModelAnswer, ModelCall
from services.worker.adapters.shared_memory import Place, Region, Regions, aligned
from services.worker.adapters.triton_client import TritonClient
from services.worker.domain.call_duration import Quickness
from services.worker.domain.output_check import OutputCheck
from services.worker.domain.split import Output
from tidegate.kernel import telemetry
from tidegate.kernel.errors import BadRequest, ModelFailed, PayloadTooLarge, TidegateError
from tidegate.kernel.protocol.envelope import (
    KEPT_KEY,
    RETRY_SAFE,
    Buffer,
    CallKey,
    Request,
    call_key,
    read_call_key,
)
from tidegate.kernel.protocol.models import TensorSpec
from tidegate.kernel.protocol.tensors import DATATYPES, elements

log = telemetry.logger(__name__)

HEADS_KEPT = 1024
# A call over HTTP costs less than over gRPC, but Triton cannot cancel it. So HTTP is used only for models
# whose calls take less than QUICK_S seconds. It is used only for inputs of up to QUICK_BYTES, because with
# larger inputs a call over HTTP costs as much as over gRPC.
QUICK_S = 0.01
QUICK_BYTES = 256 * 1024
WARN_EVERY_S = 60.0
Id = TypeVar("Id", tuple[bytes, int], tuple[bytes, int, tuple[int, ...]])
_PLAIN_NAME = re.compile("[A-Za-z0-9._~-]+")


class Model:
    """One model of one Triton. ``outputs``: the outputs in the model's signature.

    ``regions``: the shared memory for inputs and outputs of more than ``shared_above`` bytes. It is used for
    an output only if the signature fixes the output's size. ``cached``: True if Triton caches the model's
    answers. Triton's cache compares only the inputs, so every call requests all outputs and passes no
    parameters.
    """

    def __init__(
        self,
        client: TritonClient,
        name: str,
        outputs: Sequence[TensorSpec] = (),
        regions: Regions | None = None,
        shared_above: int = 0,
        decoupled: bool = False,
        cached: bool = False,
        check: OutputCheck | None = None,
    ) -> None:
        self.decoupled = decoupled
        # The number of answers. It shows the watchdog that the model does not hang. An error from the model
        # shows this too, so it counts as an answer.
        self.answers = 0
        self._check = check
        self._warned_at = float("-inf")
        self._cached = cached
        self._client = client
        self._name = name
        self._order = {output.name: at for at, output in enumerate(outputs)}
        self._regions = regions
        self._shared_above = shared_above
        self._grpc_heads: dict[tuple[bytes, int], bytes] = {}
        self._http_heads: dict[tuple[bytes, int, tuple[int, ...]], bytes] = {}
        self._quickness = Quickness(QUICK_S)
        # Use HTTP only for model names of these characters. Other characters need percent escapes in the URL
        # path, and Triton's HTTP server does not decode them.
        self._http = _PLAIN_NAME.fullmatch(name) is not None
        self._row_bytes = {output.name: size for output in outputs if (size := _row_bytes(output)) > 0}

    async def call(
        self, requests: list[Request], timeout_s: float, parameters: Mapping[str, str] | None = None
    ) -> ModelAnswer:
        """Run requests with the same call key as one batch. The answer has their rows in the same order.

        The model gets ``parameters`` in addition to those of the requests. Raises the errors of
        :meth:`TritonClient.infer`. Cancelling the task also cancels the call in Triton, if the call uses
        gRPC. Calls of quick models use HTTP, and Triton cannot cancel them (ADR 011).
        """
        if self.decoupled:
            raise BadRequest(
                "This model is decoupled: it may send any number of answers to a request. Use "
                "/generate_stream, or ModelStreamInfer over gRPC."
            )
        key = read_call_key(requests[0].key)
        if self._cached and (key.outputs or key.parameters):
            return await self._call_cached(requests, key, timeout_s, parameters)
        rows = sum(request.rows for request in requests)
        contents = [[request.data[at] for request in requests] for at in range(len(key.inputs))]
        call = ModelCall(requests[0].key, key, rows, contents, parameters or {})
        region = await self._region(call)
        started = time.monotonic()
        try:
            if region is None:
                found = await self._send(call, timeout_s)
            else:
                found = await self._send_by_region(region, call, timeout_s)
        except (BadRequest, ModelFailed, PayloadTooLarge) as error:
            self._quickness.refused(time.monotonic() - started)
            self.answers += isinstance(error, ModelFailed)
            if region is None or not _has_too_little_room(error, requests):
                raise
            self._row_bytes = {}
            return await self.call(requests, timeout_s, parameters)
        except BaseException:
            self._quickness.given_up(time.monotonic() - started)
            raise
        self._quickness.answered(time.monotonic() - started)
        self.answers += 1
        if self._check is not None and not self._check.agrees(found.outputs, rows):
            self._on_contradiction()
        return ModelAnswer(self._sorted(found.outputs, key), found.parameters)

    async def stream(self, request: Request, *, counted: bool = True) -> AsyncGenerator[ModelAnswer]:
        """Run one request and yield each answer as soon as the model sends it. There is no time limit.

        ``counted``: True to add the answers to :attr:`answers`, which shows the watchdog that the model does
        not hang.

        Raises the errors of :meth:`TritonClient.stream`. If the generator is closed, Triton cancels the
        request.
        """
        key = read_call_key(request.key)
        message = grpc_messages.begin(self._name, key.parameters)
        grpc_messages.describe(message, key, request.rows)
        message.raw_input_contents.extend(map(bytes, request.data))
        try:
            async with aclosing(self._client.stream(message)) as responses:
                async for response in responses:
                    self.answers += counted
                    found = grpc_messages.read_answer(response)
                    if self._check is not None and found.outputs and not self._check.agrees(found.outputs, 0):
                        self._on_contradiction()
                    yield ModelAnswer(self._sorted(found.outputs, key), found.parameters)
            self.answers += counted
        except ModelFailed:
            self.answers += counted
            raise

    async def _call_cached(
        self,
        requests: list[Request],
        key: CallKey,
        timeout_s: float,
        parameters: Mapping[str, str] | None,
    ) -> ModelAnswer:
        """Run requests on a model with a response cache. Return the outputs that ``key`` names.

        The call requests all outputs. If it requested only some, Triton's cache could answer with other
        outputs: the cache ignores which outputs are requested.
        """
        if key.parameters:
            raise BadRequest(
                "This model has a response cache, which ignores the parameters of a request "
                f"({', '.join(sorted(key.parameters))}). Send no parameters, or deploy the model without "
                "response_cache."
            )
        first = requests[0]._replace(key=call_key(key.inputs, (), {}))
        found = await self.call([first, *requests[1:]], timeout_s, parameters)
        by_name = {output.name: output for output in found.outputs}
        missing = [name for name in key.outputs if name not in by_name]
        if missing:
            raise BadRequest(f"the model has no output {missing[0]!r}")
        return ModelAnswer([by_name[name] for name in key.outputs], found.parameters)

    async def _send(self, call: ModelCall, timeout_s: float) -> ModelAnswer:
        """Make a call over HTTP if that is cheaper and HTTP can carry it, else over gRPC."""
        if self._http and self._quickness.quick:
            started = time.monotonic()
            sizes = tuple([sum(map(len, pieces)) for pieces in call.contents])
            if _is_for_http(call, sizes):
                head = self._http_head(call, sizes)
                request = b"".join((head, *[piece for pieces in call.contents for piece in pieces]))
                answer = await self._client.infer_http(request, timeout_s)
                if answer is not None:
                    return http_messages.read_answer(answer)
            timeout_s -= time.monotonic() - started
        message = grpc_messages.with_contents(self._grpc_head(call), call.contents)
        return grpc_messages.read_answer(await self._client.infer_raw(message, timeout_s))

    async def _send_by_region(self, region: Region, call: ModelCall, timeout_s: float) -> ModelAnswer:
        """Make a call with its large tensors in a region of shared memory."""
        assert self._regions is not None
        key, direct, inputs = call.key, list[list[Buffer]](), dict[str, Place]()
        for tensor, pieces in zip(key.inputs, call.contents, strict=True):
            if sum(map(len, pieces)) > self._shared_above:
                inputs[tensor.name] = region.put(pieces)
            else:
                direct.append(pieces)
        large = self._large_outputs(key, call.rows)
        # If a request lists any outputs, Triton returns only these. So if one output goes to shared memory,
        # all outputs must be listed.
        names = key.outputs or tuple(self._order if large else ())
        outputs = {name: region.reserve(large[name]) for name in names if name in large}
        key = CallKey(key.inputs, names, key.parameters)
        call = call._replace(key=key, contents=direct, input_places=inputs, output_places=outputs)
        try:
            found = await self._send(call, timeout_s)
            found = found._replace(outputs=[_from_region(each, region, outputs) for each in found.outputs])
        except (BadRequest, ModelFailed):
            self._regions.release(region)
            raise
        except BaseException:
            self._regions.retire(region)
            raise
        self._regions.release(region)
        return found

    async def _region(self, call: ModelCall) -> Region | None:
        """Return a region of shared memory for the large tensors of a call.

        Return None if no tensor is large, or if the shared memory is full.
        """
        if self._regions is None:
            return None
        sizes = [size for pieces in call.contents if (size := sum(map(len, pieces))) > self._shared_above]
        if self._row_bytes:
            sizes += self._large_outputs(call.key, call.rows).values()
        return await self._regions.acquire(sum(map(aligned, sizes))) if sizes else None

    def _large_outputs(self, key: CallKey, rows: int) -> dict[str, int]:
        names = key.outputs or self._order
        sizes = {name: self._row_bytes.get(name, 0) * max(rows, 1) for name in names}
        return {name: size for name, size in sizes.items() if size > self._shared_above}

    def _http_head(self, call: ModelCall, sizes: tuple[int, ...]) -> bytes:
        """Return an HTTP request without the bytes of its tensors. It is cached by key, rows and sizes."""
        if call.parameters or call.input_places or call.output_places:
            return http_messages.head(self._name, call, sizes)
        id_ = call.raw_key, call.rows, sizes
        head = self._http_heads.get(id_)
        if head is None:
            head = http_messages.head(self._name, call, sizes)
            _keep(self._http_heads, id_, head)
        return head

    def _grpc_head(self, call: ModelCall) -> bytes:
        """Return a serialized request without the bytes of its tensors. It is cached by key and rows."""
        if call.input_places or call.output_places:
            return grpc_messages.head(self._name, call) + grpc_messages.serialized(call.parameters)
        id_ = call.raw_key, call.rows
        head = self._grpc_heads.get(id_)
        if head is None:
            head = grpc_messages.head(self._name, call)
            _keep(self._grpc_heads, id_, head)
        return head + grpc_messages.serialized(call.parameters) if call.parameters else head

    def _sorted(self, found: list[Output], key: CallKey) -> list[Output]:
        # Different processes of Triton may return the outputs in different orders.
        order = {name: at for at, name in enumerate(key.outputs)} if key.outputs else self._order
        return sorted(found, key=lambda output: order.get(output.name, len(order)))

    def _on_contradiction(self) -> None:
        """Count an answer that contradicts the signature. Log at most one per WARN_EVERY_S seconds."""
        assert self._check is not None
        CONTRADICTIONS.inc()
        now = time.monotonic()
        if now - self._warned_at >= WARN_EVERY_S:
            self._warned_at = now
            log.warning(
                "answers contradict the signature",
                extra={"model": self._name, "problem": self._check.last, "answers": self._check.count},
            )


def _is_for_http(call: ModelCall, sizes: Sequence[int]) -> bool:
    """Return True if HTTP is cheaper for inputs of these sizes, and can carry this call."""
    return (
        all(sizes)
        and sum(sizes) <= QUICK_BYTES
        and (not call.parameters or http_messages.can_carry(call.parameters))
        and (not call.key.parameters or http_messages.can_carry(call.key.parameters))
    )


def _keep(heads: dict[Id, bytes], id_: Id, head: bytes) -> None:
    """Cache the head of a call, unless the call's key is long."""
    if len(id_[0]) <= KEPT_KEY:
        if len(heads) >= HEADS_KEPT:
            heads.clear()
        heads[id_] = head


def _has_too_little_room(error: TidegateError, requests: Sequence[Request]) -> bool:
    """Return True if an output did not fit into its shared memory and the requests may run again."""
    return (
        isinstance(error, ModelFailed)
        and "shared memory size" in error.message
        and all(request.flags & RETRY_SAFE for request in requests)
    )


def _row_bytes(output: TensorSpec) -> int:
    """Return the size of one row of an output in bytes; 0 if it is not known.

    If the model has no batch axis, return the size of the whole output.
    """
    return 0 if -1 in output.shape else elements(output.shape) * DATATYPES[output.datatype].size


def _from_region(output: Output, region: Region, places: Mapping[str, Place]) -> Output:
    """Return an output with its bytes. If it has a place in shared memory, read the bytes there."""
    if output.name not in places:
        return output
    size = elements(list(output.shape)) * DATATYPES[output.datatype].size
    return output._replace(raw=region.read(places[output.name].offset, size))
