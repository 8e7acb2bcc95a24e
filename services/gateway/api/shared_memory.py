"""Serve Triton's system shared memory over HTTP, for callers on the gateway's host."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

from services.gateway.adapters import socket_peer
from services.gateway.adapters.shared_regions import SharedRegions
from services.gateway.api.request_body import small_body
from services.gateway.domain import shared_memory
from tidegate.kernel.errors import BadRequest, NotFound
from tidegate.kernel.protocol.bounded_json import plain, shown
from tidegate.kernel.service import caller

OFF = (
    "system shared memory is off. An operator allows it with TIDEGATE_SHARED_MEMORY=local. Without it, send "
    "the tensors as binary data"
)
# A proxy sets these headers. A caller behind a proxy may be on another host, and then it cannot share memory
# with the gateway.
FORWARDED = frozenset({b"x-forwarded-for", b"forwarded"})


class SharedMemoryRoutes:
    """The routes of shared memory. ``regions``: None if callers may not use shared memory."""

    def __init__(self, regions: SharedRegions | None) -> None:
        self._regions = regions
        self.router = APIRouter(prefix="/v2", tags=["Open Inference Protocol v2"])
        add = self.router.add_api_route
        region = "/region/{name}"
        for path in ("/systemsharedmemory", f"/systemsharedmemory{region}"):
            add(f"{path}/status", self.status, methods=["GET"])
            add(f"{path}/unregister", self.unregister, methods=["POST"], response_class=Response)
        add(f"/systemsharedmemory{region}/register", self.register, methods=["POST"], response_class=Response)
        for path in ("/cudasharedmemory", f"/cudasharedmemory{region}"):
            add(f"{path}/status", self.cuda_status, methods=["GET"])
            add(f"{path}/unregister", self.cuda_unregister, methods=["POST"], response_class=Response)
        add(
            f"/cudasharedmemory{region}/register",
            self.cuda_register,
            methods=["POST"],
            response_class=Response,
        )

    async def status(self, name: str = "") -> list[dict[str, Any]]:
        """Return all regions of the caller, or only the region ``name``."""
        if self._regions is not None:
            return self._regions.status(_owner(), name)
        if name:
            raise NotFound(f"Unable to find system shared memory region: {name!r}: {OFF}")
        return []

    async def unregister(self, name: str = "") -> Response:
        """Unregister one region of the caller; if ``name`` is empty, all of them.

        No shared memory is deleted.
        """
        if self._regions is not None:
            self._regions.unregister(_owner(), name)
        return Response()

    async def register(self, request: Request, name: str) -> Response:
        """Register a part of a shared-memory segment under a name.

        The caller's operating-system user must be root or own the segment; else raise Forbidden.
        """
        if self._regions is None:
            raise BadRequest(OFF)
        key, offset, size = _described(await small_body(request))
        self._regions.register(_owner(), name, key, offset, size, _user(request))
        return Response()

    async def cuda_status(self, name: str = "") -> list[dict[str, Any]]:
        """Return an empty list, because no CUDA region can be registered."""
        if name:
            raise NotFound(f"Unable to find cuda shared memory region: {name!r}")
        return []

    async def cuda_unregister(self, name: str = "") -> Response:
        """Do nothing, because no CUDA region can be registered."""
        return Response()

    async def cuda_register(self, name: str) -> None:
        """Refuse to register a CUDA region, because the model may run on another host."""
        raise BadRequest(shared_memory.CUDA_REFUSED.format(name=name))


def _owner() -> str:
    return caller.current.get().principal.id


def _user(request: Request) -> int | None:
    """Return the id of the caller's operating-system user.

    Return None if the caller is on another host or behind a proxy.
    """
    client, server = request.scope.get("client"), request.scope.get("server")
    if not client or not server or any(name in FORWARDED for name, _ in request.scope["headers"]):
        return None
    return socket_peer.user_of((client[0], client[1]), (server[0], server[1]))


def _described(body: bytes) -> tuple[str, int, int]:
    """Read key, offset and size of a region from a request's body. Raise BadRequest if one is invalid."""
    try:
        request = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"failed to parse the request JSON buffer: {plain(error)}") from None
    if not isinstance(request, dict):
        raise BadRequest("the request must be a JSON object with 'key' and 'byte_size'")
    for name in ("key", "byte_size"):
        if name not in request:
            raise BadRequest(f"Shared memory register request has no {name!r} field")
    key = request["key"]
    if not isinstance(key, str):
        raise BadRequest("'key' must be the name of a segment, such as '/input'")
    return key, _number(request, "offset"), _number(request, "byte_size")


def _number(request: dict[str, Any], name: str) -> int:
    value = request.get(name, 0)
    if type(value) is not int or not 0 <= value < shared_memory.MAX_SIZE:
        raise BadRequest(f"{name!r} must be a number of bytes, got {shown(value)}")
    return value
