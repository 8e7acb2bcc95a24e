"""The methods of ``inference.GRPCInferenceService`` beside inference, and the refusals."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.json_format import ParseDict
from grpc import StatusCode

from services.gateway.api.grpc.calls import Calls, read_head
from services.gateway.api.grpc.status import refuse
from services.gateway.api.grpc.stream import Stream
from services.gateway.catalogue import EXTENSIONS, Catalogue
from tidegate import __version__, telemetry
from tidegate.errors import Forbidden, TidegateError
from tidegate.protocol.access import INFER, Principal
from tidegate.service import Health, new_request_id
from tidegate.triton_protocol import pb

log = telemetry.logger(__name__)

NAME = "inference.GRPCInferenceService"

_SHARED_MEMORY = "shared memory regions are not supported: the model may run on another host"
_OPERATORS = "log and trace settings are not for inference clients"
_REPOSITORY = (
    "loading and unloading are not for inference clients: use `tidegate deploy` and `tidegate delete`"
)
# Every method that this server refuses, and why.
REFUSED = {
    "RepositoryModelLoad": _REPOSITORY,
    "RepositoryModelUnload": _REPOSITORY,
    "SystemSharedMemoryRegister": _SHARED_MEMORY,
    "CudaSharedMemoryRegister": _SHARED_MEMORY,
    "TraceSetting": _OPERATORS,
    "LogSettings": _OPERATORS,
}

Method = Callable[[Any, Any], Awaitable[Any]]


class InferenceService:
    """One instance for each gateway process."""

    def __init__(self, calls: Calls, catalogue: Catalogue, health: Health) -> None:
        self._calls = calls
        self._catalogue = catalogue
        self._health = health

    def handler(self) -> Any:
        """All methods, as a gRPC server takes them."""
        methods = {
            "ServerLive": self._live,
            "ServerReady": self._ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata,
            "ModelMetadata": self._model_metadata,
            "ModelConfig": self._model_config,
            "ModelStatistics": self._model_statistics,
            "RepositoryIndex": self._index,
            "SystemSharedMemoryStatus": self._no_regions("SystemSharedMemoryStatus"),
            "SystemSharedMemoryUnregister": self._no_regions("SystemSharedMemoryUnregister"),
            "CudaSharedMemoryStatus": self._no_regions("CudaSharedMemoryStatus"),
            "CudaSharedMemoryUnregister": self._no_regions("CudaSharedMemoryUnregister"),
        }
        open_ = {"ServerLive", "ServerReady"}
        handlers = {
            name: _unary(name, _told(method if name in open_ else self._known(method)))
            for name, method in methods.items()
        }
        handlers |= {name: _unary(name, _refusal(why)) for name, why in REFUSED.items()}
        handlers["ModelInfer"] = _unary("ModelInfer", self._calls.infer)
        handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
            self._stream,
            request_deserializer=pb.ModelInferRequest.FromString,
            response_serializer=pb.ModelStreamInferResponse.SerializeToString,
        )
        return grpc.method_handlers_generic_handler(NAME, handlers)

    def _known(self, method: Method) -> Method:
        """The method, for callers that may ask models."""

        async def answer(request: Any, context: Any) -> Any:
            principal = self._calls.access.authenticate(read_head(context).credential)
            if not principal.may(INFER, getattr(request, "name", "") or None):
                raise Forbidden(f"{principal.name!r} may not ask for this")
            told = await method(request, context)
            for several in ("model_stats", "models"):
                if hasattr(told, several):
                    _keep_own(getattr(told, several), principal)
            return told

        return answer

    async def _stream(self, requests: Any, context: Any) -> None:
        await Stream(self._calls, context).run(requests)

    async def _live(self, request: Any, context: Any) -> Any:
        return pb.ServerLiveResponse(live=True)

    async def _ready(self, request: Any, context: Any) -> Any:
        return pb.ServerReadyResponse(ready=not self._health.problems())

    async def _model_ready(self, request: Any, context: Any) -> Any:
        return pb.ModelReadyResponse(ready=self._catalogue.is_ready(request.name, request.version))

    async def _server_metadata(self, request: Any, context: Any) -> Any:
        return pb.ServerMetadataResponse(name="tidegate", version=__version__, extensions=EXTENSIONS)

    async def _model_metadata(self, request: Any, context: Any) -> Any:
        return pb.ModelMetadataResponse(**self._catalogue.metadata(request.name, request.version))

    async def _model_config(self, request: Any, context: Any) -> Any:
        config = await self._catalogue.config(request.name, request.version)
        # A worker may be of a newer version than this process.
        return ParseDict({"config": config}, pb.ModelConfigResponse(), ignore_unknown_fields=True)

    async def _model_statistics(self, request: Any, context: Any) -> Any:
        found = await self._catalogue.statistics(request.name, request.version)
        return ParseDict(found, pb.ModelStatisticsResponse(), ignore_unknown_fields=True)

    async def _index(self, request: Any, context: Any) -> Any:
        return pb.RepositoryIndexResponse(models=self._catalogue.index(ready=request.ready))

    @staticmethod
    def _no_regions(name: str) -> Method:
        empty = getattr(pb, f"{name}Response")

        async def answer(request: Any, context: Any) -> Any:
            return empty()

        return answer


def _keep_own(entries: Any, principal: Principal) -> None:
    """Of a list of models those that the caller may use."""
    for at in range(len(entries) - 1, -1, -1):
        if not principal.may(INFER, entries[at].name):
            del entries[at]


def _unary(name: str, method: Method) -> Any:
    return grpc.unary_unary_rpc_method_handler(
        method,
        request_deserializer=getattr(pb, f"{name}Request").FromString,
        response_serializer=getattr(pb, f"{name}Response").SerializeToString,
    )


def _told(method: Method) -> Method:
    """The method, with its errors as statuses."""

    async def answer(request: Any, context: Any) -> Any:
        try:
            return await method(request, context)
        except TidegateError as error:
            await refuse(context, error, new_request_id())
        except Exception:
            log.exception("unexpected error")
            await refuse(context, TidegateError("something went wrong here; the log has it"), "")

    return answer


def _refusal(why: str) -> Method:
    async def answer(request: Any, context: Any) -> Any:
        await context.abort(StatusCode.UNIMPLEMENTED, why)

    return answer
