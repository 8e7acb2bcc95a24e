"""A client of one Triton. It uses gRPC, and HTTP for quick calls. It does not parse tensors."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Sequence, Set
from contextlib import aclosing
from typing import Any

import grpc
from grpc import StatusCode

from services.worker.adapters.http_calls import (
    CallFailed,
    ConnectionEnded,
    HttpAnswer,
    HttpCalls,
    NotListening,
)
from services.worker.adapters.triton_stream import TritonStreams
from services.worker.domain.model_config import ROWS
from tidegate.kernel.errors import (
    BadRequest,
    DeadlinePassed,
    ModelFailed,
    PayloadTooLarge,
    TidegateError,
    Unavailable,
)
from tidegate.kernel.protocol.envelope import Buffer
from tidegate.kernel.protocol.models import SequenceSpec, Signature, TensorSpec
from tidegate.kernel.protocol.sequences import spec_of, tightest
from tidegate.kernel.triton_protocol import ModelInferRequest, ModelInferResponse, pb

_SERVICE = "/inference.GRPCInferenceService/"
_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
)
LIVE_TIMEOUT_S = 2.0
# Error 7 of HTTP/2 (RFC 9113, 8.7): the server refused the stream without processing it, so the request may
# be sent again.
_REFUSED = re.compile(r"RST_STREAM with error code 7\b")
_SENDS = 3
# gRPC's messages about a lost connection. The status codes are not enough, because Triton's own errors have
# the same codes.
_CUT = re.compile(
    "(Stream removed|Socket closed|sendmsg|recvmsg|Connection reset|Broken pipe|GOAWAY|Endpoint clos|"
    "Transport closed|failed to connect)"
)
_CUT_CODES = {StatusCode.UNKNOWN.value[0], StatusCode.UNAVAILABLE.value[0]}
# Triton's answer to every call after the process of a Python model has ended. Triton does not start this
# process again.
_MODEL_DIED = re.compile("Stub process .* is not healthy")
_LATE = "the deadline passed while the model ran"
_BY_CODE: dict[int, type[TidegateError]] = {
    StatusCode.INVALID_ARGUMENT.value[0]: BadRequest,
    StatusCode.DEADLINE_EXCEEDED.value[0]: DeadlinePassed,
    StatusCode.RESOURCE_EXHAUSTED.value[0]: PayloadTooLarge,
}


class TritonClient:
    """A client of one Triton.

    Calls raise Unavailable if the server is gone, and ModelFailed for an error of the model. If the process
    of a Python model has died, calls raise Unavailable and ``model_died`` stays True. Then Triton must be
    restarted.

    ``target`` is ``unix:`` and the path of the gRPC socket. ``http`` is the path of the HTTP socket; None:
    HTTP is not used.
    """

    def __init__(self, target: str, http: str | None = None) -> None:
        self._channel = grpc.aio.insecure_channel(target, options=_OPTIONS)
        self._infer = self._channel.unary_unary(
            _SERVICE + "ModelInfer",
            request_serializer=b"".join,
            response_deserializer=ModelInferResponse.FromString,
        )
        self._http = None if http is None else HttpCalls(http)
        self.model_died = False
        self._streams = TritonStreams(
            self._channel.stream_stream(
                _SERVICE + "ModelStreamInfer",
                request_serializer=ModelInferRequest.SerializeToString,
                response_deserializer=pb.ModelStreamInferResponse.FromString,
            )
        )

    async def close(self) -> None:
        """Close the connections, so that calls in flight raise Unavailable.

        Triton cancels its gRPC calls, but still runs its HTTP calls to their end.
        """
        if self._http is not None:
            self._http.close()
        await self._streams.close()
        await self._channel.close()

    async def infer(self, request: Any, timeout_s: float | None = None) -> Any:
        """Call :meth:`infer_raw` with a ``ModelInferRequest``."""
        return await self.infer_raw([request.SerializeToString()], timeout_s)

    async def infer_raw(self, request: Sequence[Buffer], timeout_s: float | None = None) -> Any:
        """Send a serialized ``ModelInferRequest``, in pieces, and return the ``ModelInferResponse``.

        Cancelling the task cancels the call in Triton. Raises BadRequest if the model rejects the request.
        Also raises DeadlinePassed, PayloadTooLarge, ModelFailed and Unavailable.
        """
        ends_at = None if timeout_s is None else time.monotonic() + timeout_s
        sends = 0
        while True:
            sends += 1
            try:
                return await self._infer(request, timeout=timeout_s)
            except grpc.aio.AioRpcError as error:
                if error.code() is StatusCode.DEADLINE_EXCEEDED:
                    raise DeadlinePassed(_LATE) from None
                code, message = _status(error)
                if _REFUSED.search(message) is None:
                    raise self._note_death(await self._error_for(code, message)) from None
                if sends == _SENDS:
                    raise Unavailable(f"The model server refuses calls: {message}") from None
            except grpc.aio.UsageError:
                raise Unavailable("The connection to the model server was closed.") from None
            except asyncio.CancelledError:
                # gRPC also raises this if the channel is closed during the call.
                if (task := asyncio.current_task()) is not None and task.cancelling():
                    raise
                raise Unavailable("The connection to the model server was closed.") from None
            timeout_s = None if ends_at is None else ends_at - time.monotonic()

    async def infer_http(self, request: bytes, timeout_s: float | None = None) -> HttpAnswer | None:
        """Send a whole HTTP request for inference and return its answer.

        Return None, without sending it, if Triton does not listen for HTTP. Cancelling the task does not
        cancel the call in Triton. Raises the errors of :meth:`infer_raw`.
        """
        if self._http is None:
            return None
        try:
            return await self._http.call(request, timeout_s)
        except NotListening:
            return None
        except TimeoutError:
            raise DeadlinePassed(_LATE) from None
        except CallFailed as error:
            raise self._note_death(await self._error_for(error.code, error.message)) from None
        except ConnectionEnded as error:
            raise Unavailable(f"The model server has ended: {error}") from None

    async def stream(self, request: Any) -> AsyncGenerator[Any]:
        """Send a ``ModelInferRequest`` and yield each response as it arrives. There is no time limit.

        Closing the generator cancels the request in Triton. Raises ModelFailed, PayloadTooLarge, Unavailable.
        """
        try:
            async with aclosing(self._streams.answers(request)) as answers:
                async for answer in answers:
                    yield answer
        except grpc.aio.AioRpcError as error:
            raise self._note_death(await self._error_for(*_status(error))) from None
        except ModelFailed as error:
            raise self._note_death(error) from None

    def _note_death(self, error: TidegateError) -> TidegateError:
        """Return Unavailable if ``error`` says that the model's process has died, else ``error`` itself.

        If the process has died, also set ``model_died``.
        """
        if not isinstance(error, ModelFailed) or _MODEL_DIED.search(error.message) is None:
            return error
        self.model_died = True
        return Unavailable("The model's process died.")

    async def live(self) -> bool:
        """Return True if the server answers. After :meth:`close`, return False."""
        try:
            answer = await self._send(
                "ServerLive", pb.ServerLiveResponse, pb.ServerLiveRequest(), LIVE_TIMEOUT_S
            )
        except (grpc.aio.AioRpcError, grpc.aio.UsageError):
            return False
        return bool(answer.live)

    async def ready(self, model: str) -> bool:
        """Return True if the model is loaded and ready."""
        request = pb.ModelReadyRequest(name=model)
        try:
            answer = await self._send("ModelReady", pb.ModelReadyResponse, request, LIVE_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return False
        return bool(answer.ready)

    async def load(self, model: str, timeout_s: float | None = None) -> None:
        """Load or reload a model.

        If the model does not load, raise ModelFailed with one of these texts: Triton's message, the Python
        model's exception, or a text about the time limit.
        """
        request = pb.RepositoryModelLoadRequest(model_name=model)
        try:
            await self._call("RepositoryModelLoad", pb.RepositoryModelLoadResponse, request, timeout_s)
        except DeadlinePassed:
            raise ModelFailed(f"The model did not load within {timeout_s:g} s.") from None
        except BadRequest as error:
            raise ModelFailed(error.message) from None

    async def unload(self, model: str, timeout_s: float | None = None) -> None:
        """Unload a model."""
        request = pb.RepositoryModelUnloadRequest(model_name=model)
        await self._call("RepositoryModelUnload", pb.RepositoryModelUnloadResponse, request, timeout_s)

    async def metadata(self, model: str) -> Any:
        """Return the model's ``ModelMetadataResponse``."""
        return await self._call(
            "ModelMetadata", pb.ModelMetadataResponse, pb.ModelMetadataRequest(name=model)
        )

    async def config(self, model: str) -> Any:
        """Return the model's ``ModelConfig``, with the fields that Triton added."""
        answer = await self._call("ModelConfig", pb.ModelConfigResponse, pb.ModelConfigRequest(name=model))
        return answer.config

    async def statistics(self, model: str) -> Any:
        """Return the model's ``ModelStatistics``: its counts and total nanoseconds since it was loaded."""
        request = pb.ModelStatisticsRequest(name=model)
        answer = await self._call("ModelStatistics", pb.ModelStatisticsResponse, request)
        return answer.model_stats[0]

    async def signature(self, model: str) -> Signature:
        """Return the signature of a loaded model, without the batch axis in its shapes."""
        metadata, config = await asyncio.gather(self.metadata(model), self.config(model))
        return signature_of(metadata, config)

    async def sequences(self, models: Sequence[str]) -> SequenceSpec | None:
        """Return the sequence limits that all these loaded models allow; None if no model is stateful.

        Each limit is the lowest one of the stateful models.
        """
        found = [spec_of(await self.config(model)) for model in models]
        return tightest([spec for spec in found if spec is not None])

    async def instances(self, model: str) -> int:
        """Return how many calls the model can run at the same time.

        For an ensemble, this is the sum of the numbers of its steps' models.
        """
        config = await self.config(model)
        steps = [step.model_name for step in config.ensemble_scheduling.step]
        if steps:
            return sum([await self.instances(step) for step in steps])
        counts = [int(group.count) * max(1, len(group.gpus)) for group in config.instance_group]
        return max(1, sum(counts))

    async def register_region(self, name: str, size: int) -> None:
        """Make Triton map ``size`` bytes of the system shared memory ``/name`` as the region ``name``."""
        request = pb.SystemSharedMemoryRegisterRequest(name=name, key=f"/{name}", offset=0, byte_size=size)
        await self._call(
            "SystemSharedMemoryRegister", pb.SystemSharedMemoryRegisterResponse, request, LIVE_TIMEOUT_S
        )

    async def unregister_region(self, name: str) -> None:
        """Make Triton unmap a region."""
        request = pb.SystemSharedMemoryUnregisterRequest(name=name)
        await self._call(
            "SystemSharedMemoryUnregister", pb.SystemSharedMemoryUnregisterResponse, request, LIVE_TIMEOUT_S
        )

    async def _call(self, method: str, answer: Any, request: Any, timeout_s: float | None = None) -> Any:
        try:
            return await self._send(method, answer, request, timeout_s)
        except grpc.aio.AioRpcError as error:
            raise await self._error_for(*_status(error)) from None

    async def _send(self, method: str, answer: Any, request: Any, timeout_s: float | None) -> Any:
        return await self._method(method, type(request), answer)(request, timeout=timeout_s)

    def _method(self, name: str, request: Any, answer: Any) -> Any:
        return self._channel.unary_unary(
            _SERVICE + name,
            request_serializer=request.SerializeToString,
            response_deserializer=answer.FromString,
        )

    async def _error_for(self, code: int, message: str) -> TidegateError:
        if code in _BY_CODE:
            return _BY_CODE[code](message)
        cut = code in _CUT_CODES and _CUT.match(message) is not None
        # Triton's errors have the same codes as a broken connection, so check if Triton is alive.
        if not cut and await self.live():
            return ModelFailed(message)
        return Unavailable(f"The model server has ended: {message}")


def _status(error: grpc.aio.AioRpcError) -> tuple[int, str]:
    number: int = error.code().value[0]
    return number, error.details() or error.code().name


def signature_of(metadata: Any, config: Any) -> Signature:
    """Return the signature of a model, from its metadata and configuration in Triton.

    Raises ModelFailed if the metadata has no inputs or no outputs.
    """
    rows = int(config.parameters[ROWS].string_value) if ROWS in config.parameters else 0
    first = 1 if rows or config.max_batch_size > 0 else 0

    if not metadata.inputs or not metadata.outputs:
        missing = "inputs" if not metadata.inputs else "outputs"
        raise ModelFailed(
            f"The model does not describe its {missing}. Deploy it with a signature (`tidegate deploy "
            "--signature FILE.json`), or describe them in the model's auto_complete_config."
        )
    optional = {tensor.name for tensor in config.input if tensor.optional}

    def specs(tensors: Sequence[Any], optional: Set[str] = frozenset()) -> list[TensorSpec]:
        return [
            TensorSpec(
                name=t.name, datatype=t.datatype, shape=list(t.shape)[first:], optional=t.name in optional
            )
            for t in tensors
        ]

    return Signature(
        inputs=specs(metadata.inputs, optional),
        outputs=specs(metadata.outputs),
        max_batch_size=rows or config.max_batch_size,
        decoupled=config.model_transaction_policy.decoupled,
    )


__all__ = ["ModelInferRequest", "ModelInferResponse", "TritonClient", "signature_of"]
