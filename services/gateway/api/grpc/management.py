"""Triton's gRPC methods other than inference: model control, shared memory, trace and log settings."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from services.gateway.adapters import socket_peer
from services.gateway.adapters.shared_regions import SharedRegions
from services.gateway.api.server_settings import ServerSettings
from services.gateway.api.shared_memory import FORWARDED, OFF
from services.gateway.application.model_control import ModelControl
from services.gateway.domain import server_settings, shared_memory
from services.gateway.domain.server_settings import LOG_REMEDY, TRACE_REMEDY
from tidegate.kernel.errors import BadRequest, Forbidden, NotFound
from tidegate.kernel.protocol.access import INFER, lacks
from tidegate.kernel.triton_protocol import pb

MethodHandler = Callable[[Any, Any], Awaitable[Any]]


class ManagementMethods:
    """The methods of Triton's management API.

    ``regions``: the callers' shared memory; None if callers may not use it.
    """

    def __init__(
        self, control: ModelControl, regions: SharedRegions | None, settings: ServerSettings
    ) -> None:
        self._control = control
        self._regions = regions
        self._settings = settings

    def handlers(self) -> dict[str, MethodHandler]:
        """Return the methods, each under its name. Each method checks the caller itself."""
        inferring = {
            "SystemSharedMemoryStatus": self._status,
            "SystemSharedMemoryRegister": self._register,
            "SystemSharedMemoryUnregister": self._unregister,
            "CudaSharedMemoryStatus": self._cuda_status,
            "CudaSharedMemoryRegister": self._cuda_register,
            "CudaSharedMemoryUnregister": self._cuda_unregister,
            "TraceSetting": self._trace,
            "LogSettings": self._log,
        }
        return {name: _may_infer(method) for name, method in inferring.items()} | {
            "RepositoryModelLoad": self._load,
            "RepositoryModelUnload": self._unload,
        }

    async def _load(self, request: Any, context: Any) -> Any:
        await self._control.load(request.model_name, request.parameters, context.principal)
        return pb.RepositoryModelLoadResponse()

    async def _unload(self, request: Any, context: Any) -> Any:
        await self._control.unload(request.model_name, context.principal)
        return pb.RepositoryModelUnloadResponse()

    async def _status(self, request: Any, context: Any) -> Any:
        if self._regions is None:
            if request.name:
                raise NotFound(f"Unable to find system shared memory region: {request.name!r}: {OFF}")
            return pb.SystemSharedMemoryStatusResponse()
        found = self._regions.status(context.principal.id, request.name)
        status = pb.SystemSharedMemoryStatusResponse.RegionStatus
        return pb.SystemSharedMemoryStatusResponse(regions={each["name"]: status(**each) for each in found})

    async def _register(self, request: Any, context: Any) -> Any:
        if self._regions is None:
            raise BadRequest(OFF)
        self._regions.register(
            context.principal.id,
            request.name,
            request.key,
            request.offset,
            request.byte_size,
            _user(context),
        )
        return pb.SystemSharedMemoryRegisterResponse()

    async def _unregister(self, request: Any, context: Any) -> Any:
        if self._regions is not None:
            self._regions.unregister(context.principal.id, request.name)
        return pb.SystemSharedMemoryUnregisterResponse()

    async def _cuda_status(self, request: Any, context: Any) -> Any:
        if request.name:
            raise NotFound(f"Unable to find cuda shared memory region: {request.name!r}")
        return pb.CudaSharedMemoryStatusResponse()

    async def _cuda_register(self, request: Any, context: Any) -> Any:
        raise BadRequest(shared_memory.CUDA_REFUSED.format(name=request.name))

    async def _cuda_unregister(self, request: Any, context: Any) -> Any:
        return pb.CudaSharedMemoryUnregisterResponse()

    async def _trace(self, request: Any, context: Any) -> Any:
        present = self._settings.trace(request.model_name, context.principal)
        given = {name: _trace_value(setting, present.get(name)) for name, setting in request.settings.items()}
        server_settings.check_update(present, given, TRACE_REMEDY)
        response = pb.TraceSettingResponse()
        for name, value in present.items():
            response.settings[name].value.extend(value if isinstance(value, list) else [value])
        return response

    async def _log(self, request: Any, context: Any) -> Any:
        present = self._settings.log
        given = {name: _log_value(setting) for name, setting in request.settings.items()}
        server_settings.check_update(present, given, LOG_REMEDY)
        response = pb.LogSettingsResponse()
        for name, value in present.items():
            setting = response.settings[name]
            if isinstance(value, bool):
                setting.bool_param = value
            elif isinstance(value, int):
                setting.uint32_param = value
            else:
                setting.string_param = value
        return response


def _trace_value(setting: Any, present: Any) -> Any:
    """Return the value that an update sets. An empty list leaves the setting as it is."""
    values = list(setting.value)
    if not values:
        return present
    return values if isinstance(present, list) or len(values) != 1 else values[0]


def _log_value(setting: Any) -> Any:
    return getattr(setting, setting.WhichOneof("parameter_choice") or "string_param")


def _may_infer(method: MethodHandler) -> MethodHandler:
    async def handle(request: Any, context: Any) -> Any:
        if not context.principal.may(INFER):
            raise Forbidden(lacks(context.principal, (INFER,)))
        return await method(request, context)

    return handle


def _user(context: Any) -> int | None:
    """Return the user id of a caller's program; None if the caller is on another host or behind a proxy."""
    client, server = context.addresses()
    if client is None or server is None or FORWARDED & context.headers.fields.keys():
        return None
    return socket_peer.user_of(client, server)
