"""The methods of ``inference.GRPCInferenceService``."""

from __future__ import annotations

from typing import Any

from google.protobuf.json_format import ParseDict

from services.gateway.api.grpc.inference import GrpcInference
from services.gateway.api.grpc.inference_stream import InferenceStream
from services.gateway.api.grpc.management import ManagementMethods, MethodHandler
from services.gateway.api.grpc.server_call import MethodSpec
from services.gateway.application.catalogue import EXTENSIONS, SERVER_NAME, Catalogue
from tidegate.kernel.errors import Forbidden, NotFound
from tidegate.kernel.protocol.access import INFER, Principal, may_not_use
from tidegate.kernel.service.app import Health
from tidegate.kernel.triton_protocol import pb
from tidegate.version import VERSION

NAME = "inference.GRPCInferenceService"

# The largest message of a method, in bytes. OPEN_BYTES is the limit for methods that need no credential.
# NAME_BYTES is the limit for methods whose message only names a model.
OPEN_BYTES = 4 * 1024
NAME_BYTES = 64 * 1024


class InferenceService:
    """The inference service of a gateway process."""

    def __init__(
        self,
        calls: GrpcInference,
        catalogue: Catalogue,
        health: Health,
        management: ManagementMethods,
        *,
        max_bytes: int,
    ) -> None:
        """``max_bytes``: the size of the largest inference request that is accepted."""
        self._max_bytes = max_bytes
        self._management = management
        self._calls = calls
        self._catalogue = catalogue
        self._health = health

    def methods(self) -> dict[str, MethodSpec]:
        """Return all methods, each under its path."""
        handlers = {
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata,
            "ModelMetadata": self._model_metadata,
            "ModelConfig": self._model_config,
            "ModelStatistics": self._model_statistics,
            "RepositoryIndex": self._index,
        }
        methods = {name: self._method(name, self._authorized(handler)) for name, handler in handlers.items()}
        for name, handler in self._management.handlers().items():
            methods[name] = self._method(name, handler)
        for name, handler in (("ServerLive", self._live), ("ServerReady", self._ready)):
            methods[name] = self._method(name, handler, OPEN_BYTES, open_=True)
        methods["ModelInfer"] = self._method("ModelInfer", self._calls.infer, self._max_bytes)
        methods["ModelStreamInfer"] = MethodSpec(
            self._stream, pb.ModelInferRequest, self._max_bytes, streams=True
        )
        return {f"/{NAME}/{name}": method for name, method in methods.items()}

    @staticmethod
    def _method(
        name: str, answer: MethodHandler, limit: int = NAME_BYTES, *, open_: bool = False
    ) -> MethodSpec:
        return MethodSpec(answer, getattr(pb, f"{name}Request"), limit, open=open_)

    @staticmethod
    def _authorized(method: MethodHandler) -> MethodHandler:
        """Return a method that checks whether the caller may use the model, and then calls ``method``.

        If the caller may not use the model, the returned method raises Forbidden. If the response contains a
        list of models, the list keeps only those that the caller may use.
        """

        async def handle(request: Any, context: Any) -> Any:
            principal = context.principal
            name = getattr(request, "name", "")
            if not principal.may(INFER, name or None):
                raise Forbidden(may_not_use(principal, name))
            response = await method(request, context)
            for field in ("model_stats", "models"):
                if hasattr(response, field):
                    _remove_forbidden(getattr(response, field), principal)
            return response

        return handle

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
            ready = False  # Triton also answers "not ready" for an unknown model
        return pb.ModelReadyResponse(ready=ready)

    async def _server_metadata(self, request: Any, context: Any) -> Any:
        return pb.ServerMetadataResponse(name=SERVER_NAME, version=VERSION, extensions=EXTENSIONS)

    async def _model_metadata(self, request: Any, context: Any) -> Any:
        return pb.ModelMetadataResponse(**self._catalogue.metadata(request.name, request.version))

    async def _model_config(self, request: Any, context: Any) -> Any:
        config = await self._catalogue.config(request.name, request.version)
        # The worker can run a newer Tidegate and send fields that this process does not know.
        return ParseDict({"config": config}, pb.ModelConfigResponse(), ignore_unknown_fields=True)

    async def _model_statistics(self, request: Any, context: Any) -> Any:
        statistics = await self._catalogue.statistics(request.name, request.version)
        return ParseDict(statistics, pb.ModelStatisticsResponse(), ignore_unknown_fields=True)

    async def _index(self, request: Any, context: Any) -> Any:
        return pb.RepositoryIndexResponse(models=self._catalogue.index(ready=request.ready))


def _remove_forbidden(entries: Any, principal: Principal) -> None:
    """Remove from ``entries`` all models that the caller may not use."""
    for at in range(len(entries) - 1, -1, -1):
        if not principal.may(INFER, entries[at].name):
            del entries[at]
