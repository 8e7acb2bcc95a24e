"""HTTP code that jobs, batches and webhooks share: the caller, ids in paths, pages of lists, JSON."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
from starlette.responses import Response

from services.gateway.api.body_limits import Headers
from services.gateway.api.compression import HttpResponse, deliver
from tidegate.kernel.errors import BadRequest, NotFound
from tidegate.kernel.protocol.access import INFER, Principal
from tidegate.kernel.protocol.jobs import read_id
from tidegate.kernel.service import caller


def request_principal() -> Principal:
    """Return the caller of the current request, if it has the scope ``infer``.

    Otherwise, raise Unauthorized for an anonymous caller, and Forbidden for any other caller.
    """
    return caller.require(INFER)


def id_in_path(text: str, what: str) -> bytes:
    """Parse an id in a URL path. Raises NotFound if the text is no id.

    ``what``: the kind of object that the id names, for the error message: "job" or "batch".
    """
    id_ = read_id(text)
    if id_ is None:
        raise NotFound(f"there is no {what} {text[:64]}: expected an id of 32 hex digits")
    return id_


def read_cursor(cursor: str | None) -> bytes | None:
    """Parse a cursor, which is the ``next`` of the previous page. Raises BadRequest if it is no id."""
    id_ = None if cursor is None else read_id(cursor)
    if cursor is not None and id_ is None:
        raise BadRequest(f"cursor must be the value of 'next' in the previous page, got {cursor[:40]!r}")
    return id_


def page(items: list[dict[str, Any]], limit: int) -> Response:
    """Return a page of a list as an HTTP response."""
    return json_response(page_of(items, limit))


def page_of(items: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    """Return a page of a list. Its ``next`` is null if it has fewer than ``limit`` items."""
    return {"items": items, "next": items[-1]["id"] if len(items) == limit else None}


def json_response(document: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a document as an HTTP response with JSON."""
    return Response(orjson.dumps(document), status, headers, "application/json")


async def as_response(answer: HttpResponse, headers: Headers) -> Response:
    """Convert a response to FastAPI's class. Compress it if the caller accepts compression."""
    future: asyncio.Future[HttpResponse] = asyncio.get_running_loop().create_future()
    deliver(answer, headers, future.set_result)
    done = await future
    response = Response(b"".join((done.body, *done.tail)), done.status)
    response.raw_headers = [(name, value) for name, value in done.headers if name != b"x-request-id"]
    return response
