"""A coalesced call to the model in Triton: raw bytes in, raw bytes out, no tensor parsed."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from functools import lru_cache
from typing import Any, NamedTuple

import orjson

from services.worker.adapters.http_calls import HttpAnswer
from services.worker.adapters.metrics import CONTRADICTIONS
from services.worker.adapters.shared_memory import Region, Regions, aligned
from services.worker.adapters.triton_client import ModelInferRequest, TritonClient
from services.worker.domain.call_duration import Quickness
from services.worker.domain.output_check import OutputCheck
from services.worker.domain.split import Output
from tidegate.kernel import telemetry
from tidegate.kernel.errors import BadRequest, ModelFailed, PayloadTooLarge
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

# The tag of ``raw_input_contents`` in a ModelInferRequest: field 7, bytes. Fields may come in any order, so
# the contents follow a head that was serialized before.
RAW_INPUT = bytes((7 << 3 | 2,))
HEADS_KEPT = 1024
# Over HTTP a call costs Triton a third less, but it cannot be cancelled there: for calls of a model whose
# calls take less than QUICK_S, with inputs of no more than QUICK_BYTES together.
QUICK_S = 0.01
QUICK_BYTES = 64 * 1024
TELL_EVERY_S = 60.0
_PLAIN_NAME = re.compile("[A-Za-z0-9._~-]+")
# Triton adds these to some answers, as those of ensembles; no model means them.
_TRITONS_OWN = frozenset({"sequence_id", "sequence_start", "sequence_end"})


class Answer(NamedTuple):
    """An answer of the model: its outputs, and the parameters that the model gave it."""

    outputs: list[Output]
    parameters: dict[str, Any]


class Model:
    """One model of one Triton; ``outputs`` are its outputs as its signature has them.

    Tensors above ``shared_above`` bytes go through ``regions``: inputs, and outputs of a size known before.
    ``cached``: Triton keeps its answers. It finds them by their inputs alone, so such a model is always asked
    for all of its outputs, and takes no parameters.
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
        # Answers so far, also those that say that the model has failed: it is alive.
        self.answers = 0
        self._check = check
        self._told_at = float("-inf")
        self._cached = cached
        self._client = client
        self._name = name
        self._order = {output.name: at for at, output in enumerate(outputs)}
        self._regions = regions
        self._shared_above = shared_above
        self._heads: dict[tuple[bytes, int], bytes] = {}
        self._http_heads: dict[tuple[bytes, int, tuple[int, ...]], bytes] = {}
        self._quickness = Quickness(QUICK_S)
        # Triton's HTTP server looks a model up by the path as it is written, percents and all.
        self._http = _PLAIN_NAME.fullmatch(name) is not None
        self._row_bytes = {output.name: size for output in outputs if (size := _row_bytes(output)) > 0}

    async def call(
        self, requests: list[Request], timeout_s: float, parameters: Mapping[str, str] | None = None
    ) -> Answer:
        """Run requests of one call key as one batch; the answer has their rows in order.

        ``parameters`` are for the model to read, besides those that the requests bring.
        Raises what :meth:`TritonClient.infer` raises. Cancelling the task cancels the call in Triton, unless
        it is one of a quick model (ADR 011).
        """
        if self.decoupled:
            raise BadRequest(
                "the model is decoupled (any number of answers to a request): use /generate_stream, or "
                "ModelStreamInfer over gRPC"
            )
        key = read_call_key(requests[0].key)
        if self._cached and (key.outputs or key.parameters):
            return await self._call_cached(requests, key, timeout_s, parameters)
        rows = sum(request.rows for request in requests)
        contents = [[request.data[at] for request in requests] for at in range(len(key.inputs))]
        region = await self._region(key, rows, contents)
        if region is not None:
            try:
                message = _with_parameters(self._begun(key), parameters or {})
                found = await self._by_region(message, key, rows, contents, timeout_s, region)
            except ModelFailed as error:
                # An output that is larger than the signature says; the model has run already.
                if "shared memory size" not in error.message or not all(
                    r.flags & RETRY_SAFE for r in requests
                ):
                    raise
                self._row_bytes = {}
                return await self.call(requests, timeout_s, parameters)
        else:
            found = await self._small(requests[0].key, key, rows, contents, timeout_s, parameters)
        if self._check is not None and not self._check.agrees(found.outputs, rows):
            self._contradicted()
        return Answer(self._sorted(found.outputs, key), found.parameters)

    def _contradicted(self) -> None:
        """Count an answer that contradicts the signature, and log it at most once in a while."""
        assert self._check is not None
        CONTRADICTIONS.inc()
        now = time.monotonic()
        if now - self._told_at >= TELL_EVERY_S:
            self._told_at = now
            log.warning(
                "answers contradict the signature",
                extra={"model": self._name, "problem": self._check.last, "answers": self._check.count},
            )

    async def _call_cached(
        self,
        requests: list[Request],
        key: CallKey,
        timeout_s: float,
        parameters: Mapping[str, str] | None,
    ) -> Answer:
        """Ask for all outputs and return those of the key: an answer kept for others would lack some."""
        if key.parameters:
            raise BadRequest(
                f"the model has a response cache, which does not tell requests with other parameters "
                f"({', '.join(sorted(key.parameters))}) apart: send none, or deploy it without response_cache"
            )
        first = requests[0]._replace(key=call_key(key.inputs, (), {}))
        found = await self.call([first, *requests[1:]], timeout_s, parameters)
        by_name = {output.name: output for output in found.outputs}
        missing = [name for name in key.outputs if name not in by_name]
        if missing:
            raise BadRequest(f"the model has no output {missing[0]!r}")
        return Answer([by_name[name] for name in key.outputs], found.parameters)

    async def _small(
        self,
        raw_key: bytes,
        key: CallKey,
        rows: int,
        contents: list[list[Buffer]],
        timeout_s: float,
        parameters: Mapping[str, str] | None,
    ) -> Answer:
        """Without shared memory: over HTTP if that is for this call, else over gRPC."""
        started = time.monotonic()
        try:
            found = None
            if self._http and self._quickness.quick and not parameters:
                found = await self._by_http(raw_key, key, rows, contents, timeout_s)
            if found is None:
                head = self._head(raw_key, rows)
                if parameters:
                    # These differ from call to call; where in a message a field stands is open.
                    head += _with_parameters(ModelInferRequest(), parameters).SerializeToString()
                left_s = timeout_s - (time.monotonic() - started)
                found = await self._by_grpc(head, contents, left_s)
        except (BadRequest, ModelFailed, PayloadTooLarge) as error:
            self._quickness.refused(time.monotonic() - started)
            self.answers += isinstance(error, ModelFailed)
            raise
        except BaseException:
            self._quickness.given_up(time.monotonic() - started)
            raise
        self._quickness.answered(time.monotonic() - started)
        self.answers += 1
        return found

    async def _region(self, key: CallKey, rows: int, contents: list[list[Buffer]]) -> Region | None:
        """Room for what is large of a call; None: nothing is, or there is no room."""
        if self._regions is None:
            return None
        sizes = [size for pieces in contents if (size := sum(map(len, pieces))) > self._shared_above]
        if self._row_bytes:
            sizes += self._large_outputs(key, rows).values()
        return await self._regions.take(sum(map(aligned, sizes))) if sizes else None

    def _large_outputs(self, key: CallKey, rows: int) -> dict[str, int]:
        wanted = key.outputs or self._order
        sizes = {name: self._row_bytes.get(name, 0) * max(rows, 1) for name in wanted}
        return {name: size for name, size in sizes.items() if size > self._shared_above}

    async def stream(self, request: Request) -> AsyncGenerator[Answer]:
        """Run one request and give each of its answers as it is made, without a time limit.

        Raises what :meth:`TritonClient.stream` raises. Closing the generator cancels the request in Triton.
        """
        key = read_call_key(request.key)
        message = self._begun(key)
        _put_tensors(message, key, request.rows)
        message.raw_input_contents.extend(map(bytes, request.data))
        try:
            async with aclosing(self._client.stream(message)) as answers:
                async for answer in answers:
                    self.answers += 1
                    outputs = _outputs(answer)
                    if self._check is not None and outputs and not self._check.agrees(outputs, 0):
                        self._contradicted()
                    yield _answer(answer, self._sorted(outputs, key))
            self.answers += 1
        except ModelFailed:
            self.answers += 1
            raise

    def _sorted(self, found: list[Output], key: CallKey) -> list[Output]:
        # Triton gives them in an order of its own, another one in each process.
        order = {name: at for at, name in enumerate(key.outputs)} if key.outputs else self._order
        return sorted(found, key=lambda output: order.get(output.name, len(order)))

    def _begun(self, key: CallKey) -> Any:
        return _with_parameters(ModelInferRequest(model_name=self._name), key.parameters)

    def _head(self, raw_key: bytes, rows: int) -> bytes:
        """A serialized request without its tensors' contents; those of equal keys and rows share it."""
        head = self._heads.get((raw_key, rows))
        if head is None:
            key = read_call_key(raw_key)
            message = self._begun(key)
            _put_tensors(message, key, rows)
            head = message.SerializeToString()
            if len(raw_key) <= KEPT_KEY:
                if len(self._heads) >= HEADS_KEPT:
                    self._heads.clear()
                self._heads[raw_key, rows] = head
        return head

    async def _by_http(
        self, raw_key: bytes, key: CallKey, rows: int, contents: list[list[Buffer]], timeout_s: float
    ) -> Answer | None:
        """As one HTTP request; None, and nothing was sent, where it is not for HTTP."""
        sizes = tuple([sum(map(len, pieces)) for pieces in contents])
        if key.parameters or len(raw_key) > KEPT_KEY or not all(sizes) or sum(sizes) > QUICK_BYTES:
            return None
        head = self._http_heads.get((raw_key, rows, sizes))
        if head is None:
            if len(self._http_heads) >= HEADS_KEPT:
                self._http_heads.clear()
            head = self._http_heads[raw_key, rows, sizes] = http_head(self._name, key, rows, sizes)
        request = b"".join((head, *[piece for pieces in contents for piece in pieces]))
        answer = await self._client.infer_http(request, timeout_s)
        return None if answer is None else _http_answer(answer)

    async def _by_grpc(self, head: bytes, contents: list[list[Buffer]], timeout_s: float) -> Answer:
        pieces: list[Buffer] = [head]
        for tensor in contents:
            pieces.append(RAW_INPUT + _varint(sum(map(len, tensor))))
            pieces += tensor
        answer = await self._client.infer_raw(pieces, timeout_s)
        return _answer(answer, _outputs(answer))

    async def _by_region(
        self,
        message: Any,
        key: CallKey,
        rows: int,
        contents: list[list[Buffer]],
        timeout_s: float,
        region: Region,
    ) -> Answer:
        assert self._regions is not None
        for tensor, pieces in zip(key.inputs, contents, strict=True):
            shape = (rows, *tensor.dims) if rows else tensor.dims
            slot = message.inputs.add(name=tensor.name, datatype=tensor.datatype.name, shape=shape)
            if sum(map(len, pieces)) > self._shared_above:
                region.put(slot, pieces)
            else:
                message.raw_input_contents.append(_joined(pieces))
        large = self._large_outputs(key, rows)
        places = {}
        for name in key.outputs or (self._order if large else ()):
            slot = message.outputs.add(name=name)
            if name in large:
                places[name] = region.reserve(slot, large[name])
        try:
            answer = await self._client.infer(message, timeout_s)
            found = _answer(answer, _from_region(answer, region, places))
        except (BadRequest, ModelFailed) as error:
            self._regions.give(region)
            self.answers += isinstance(error, ModelFailed)
            raise
        except BaseException:
            self._regions.retire(region)
            raise
        self._regions.give(region)
        self.answers += 1
        return found


def _with_parameters(message: Any, parameters: Mapping[str, object]) -> Any:
    for name, value in parameters.items():
        _set_parameter(message, name, value)
    return message


def _put_tensors(message: Any, key: CallKey, rows: int) -> None:
    for tensor in key.inputs:
        shape = (rows, *tensor.dims) if rows else tensor.dims
        message.inputs.add(name=tensor.name, datatype=tensor.datatype.name, shape=shape)
    for name in key.outputs:
        message.outputs.add(name=name)


def _varint(number: int) -> bytes:
    """A number as protobuf writes lengths: seven bits a byte, the lowest first."""
    written = bytearray()
    while number > 0x7F:
        written.append(number & 0x7F | 0x80)
        number >>= 7
    written.append(number)
    return bytes(written)


def http_head(model: str, key: CallKey, rows: int, sizes: Sequence[int]) -> bytes:
    """All of an HTTP request for inference but the tensors' bytes, of which ``sizes`` says how many."""
    asked: dict[str, Any] = {
        "inputs": [
            {
                "name": tensor.name,
                "datatype": tensor.datatype.name,
                "shape": [rows, *tensor.dims] if rows else list(tensor.dims),
                "parameters": {"binary_data_size": size},
            }
            for tensor, size in zip(key.inputs, sizes, strict=True)
        ],
        "parameters": {"binary_data_output": True},
    }
    if key.outputs:
        asked["outputs"] = [{"name": name, "parameters": {"binary_data": True}} for name in key.outputs]
    head = orjson.dumps(asked)
    return (
        b"POST /v2/models/%s/infer HTTP/1.1\r\nHost: triton\r\nInference-Header-Content-Length: %d\r\n"
        b"Content-Length: %d\r\n\r\n%s"
    ) % (model.encode(), len(head), len(head) + sum(sizes), head)


class _Described(NamedTuple):
    """The head of an HTTP answer: name, datatype, shape and size in bytes of each output; the parameters."""

    outputs: list[tuple[str, str, tuple[int, ...], int]]
    parameters: dict[str, Any]


def _http_answer(answer: HttpAnswer) -> Answer:
    # A head with long parameters is not kept: it hardly comes again.
    described = _described(answer.head) if len(answer.head) <= KEPT_KEY else _describe(answer.head)
    found, at = [], 0
    for name, datatype, shape, size in described.outputs:
        found.append(Output(name, datatype, shape, answer.data[at : at + size]))
        at += size
    return Answer(found, described.parameters)


def _describe(head: bytes) -> _Described:
    told = orjson.loads(head)
    outputs = [
        (output["name"], output["datatype"], tuple(output["shape"]), output["parameters"]["binary_data_size"])
        for output in told["outputs"]
    ]
    parameters = told.get("parameters") or {}
    return _Described(outputs, {name: value for name, value in parameters.items() if _is_models(name)})


# Kept, because the heads of equal calls are equal.
_described = lru_cache(HEADS_KEPT)(_describe)


def _outputs(answer: Any) -> list[Output]:
    return [
        Output(output.name, output.datatype, tuple(output.shape), raw)
        for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)
    ]


def _answer(answer: Any, outputs: list[Output]) -> Answer:
    """Return an answer of Triton with ``outputs`` and the parameters that the model gave it."""
    if not answer.parameters:
        return Answer(outputs, {})
    found = {}
    for name, parameter in answer.parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        if kind is not None and _is_models(name):
            found[name] = getattr(parameter, kind)
    return Answer(outputs, found)


def _is_models(name: str) -> bool:
    """Return whether the model gave a parameter of this name, and not Triton."""
    return not name.startswith("triton_") and name not in _TRITONS_OWN


def _joined(pieces: list[Buffer]) -> bytes:
    return bytes(pieces[0]) if len(pieces) == 1 else b"".join(pieces)


def _row_bytes(output: TensorSpec) -> int:
    """Bytes of an output for each row of a call, or all of them without a batch axis; 0: not known before."""
    return 0 if -1 in output.shape else elements(output.shape) * DATATYPES[output.datatype].size


def _from_region(answer: Any, region: Region, places: dict[str, int]) -> list[Output]:
    """The outputs of an answer; those at ``places`` are in the region, and empty in the answer."""
    found = []
    for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True):
        shape = tuple(output.shape)
        if output.name in places:
            raw = region.read(places[output.name], elements(list(shape)) * DATATYPES[output.datatype].size)
        found.append(Output(output.name, output.datatype, shape, raw))
    return found


def _set_parameter(message: ModelInferRequest, name: str, value: object) -> None:
    parameter = message.parameters[name]
    if isinstance(value, bool):
        parameter.bool_param = value
    elif isinstance(value, int):
        parameter.int64_param = value
    elif isinstance(value, float):
        parameter.double_param = value
    else:
        parameter.string_param = str(value)
