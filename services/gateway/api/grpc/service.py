"""The methods of ``inference.GRPCInferenceService`` beside inference, and the refusals."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from google.protobuf.json_format import ParseDict
from grpc import StatusCode

from services.gateway.api.grpc.inference import GrpcInference
from services.gateway.api.grpc.inference_stream import InferenceStream
from services.gateway.api.grpc.server_call import MethodSpec
from services.gateway.application.catalogue import EXTENSIONS, Catalogue
from tidegate.kernel.errors import Forbidden, NotFound
from tidegate.kernel.protocol.access import INFER, Principal, may_not_use
from tidegate.kernel.service.app import Health
from tidegate.kernel.triton_protocol import pb
from tidegate.version import VERSION

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

# Bytes of the largest message: of a method that needs no credential, and of one that only names a model.
OPEN_BYTES = 4 * 1024
NAME_BYTES = 64 * 1024

MethodHandler = Callable[[Any, Any], Awaitable[Any]]


class InferenceService:
    """One instance for each gateway process."""

    def __init__(self, calls: GrpcInference, catalogue: Catalogue, health: Health, *, max_bytes: int) -> None:
        """``max_bytes``: of the largest message of an inference request."""
        self._max_bytes = max_bytes
        self._calls = calls
        self._catalogue = catalogue
        self._health = health

    def methods(self) -> dict[str, MethodSpec]:
        """Return all methods by their paths."""
        answers = {
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
        found = {name: self._method(name, self._known(answer)) for name, answer in answers.items()}
        found |= {name: self._method(name, _refusal(why)) for name, why in REFUSED.items()}
        for name, answer in (("ServerLive", self._live), ("ServerReady", self._ready)):
            found[name] = self._method(name, answer, OPEN_BYTES, open_=True)
        found["ModelInfer"] = self._method("ModelInfer", self._calls.infer, self._max_bytes)
        found["ModelStreamInfer"] = MethodSpec(
            self._stream, pb.ModelInferRequest, self._max_bytes, streams=True
        )
        return {f"/{NAME}/{name}": method for name, method in found.items()}

    @staticmethod
    def _method(
        name: str, answer: MethodHandler, limit: int = NAME_BYTES, *, open_: bool = False
    ) -> MethodSpec:
        return MethodSpec(answer, getattr(pb, f"{name}Request"), limit, open=open_)

    @staticmethod
    def _known(method: MethodHandler) -> MethodHandler:
        """The method, for callers that may ask models."""

        async def answer(request: Any, context: Any) -> Any:
            principal = context.principal
            name = getattr(request, "name", "")
            if not principal.may(INFER, name or None):
                raise Forbidden(may_not_use(principal, name))
            told = await method(request, context)
            for several in ("model_stats", "models"):
                if hasattr(told, several):
                    _keep_own(getattr(told, several), principal)
            return told

        return answer

    async def _stream(self, requests: Any, context: Any) -> None:
        await InferenceStream(self._calls, context).run(requests)

    async def _live(self, request: Any, context: Any) -> Any:
        return pb.ServerLiveResponse(live=True)

    async def _ready(self, request: Any, context: Any) -> Any:
        return pb.ServerReadyResponse(ready=not self._health.problems())

    async def _model_ready(self, request: Any, context: Any) -> Any:
        try:
            ready = not self._catalogue.not_ready(request.name, request.version)
        except NotFound:
            ready = False  # as Triton answers
        return pb.ModelReadyResponse(ready=ready)

    async def _server_metadata(self, request: Any, context: Any) -> Any:
        return pb.ServerMetadataResponse(name="tidegate", version=VERSION, extensions=EXTENSIONS)

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
    def _no_regions(name: str) -> MethodHandler:
        empty = getattr(pb, f"{name}Response")

        async def answer(request: Any, context: Any) -> Any:
            return empty()

        return answer


def _keep_own(entries: Any, principal: Principal) -> None:
    """Of a list of models those that the caller may use."""
    for at in range(len(entries) - 1, -1, -1):
        if not principal.may(INFER, entries[at].name):
            del entries[at]


def _refusal(why: str) -> MethodHandler:
    async def answer(request: Any, context: Any) -> Any:
        await context.abort(StatusCode.UNIMPLEMENTED, why)

    return answer
