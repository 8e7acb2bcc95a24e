"""What jobs and batches have in common at their doors: who asks, ids in paths, pages of lists, JSON."""

from __future__ import annotations

from typing import Any

import orjson
from starlette.responses import Response

from tidegate.kernel.errors import BadRequest, NotFound
from tidegate.kernel.protocol.access import INFER, Principal
from tidegate.kernel.protocol.jobs import read_id
from tidegate.kernel.service import caller


def request_principal() -> Principal:
    """Who asks. Raises Unauthorized or Forbidden."""
    return caller.require(INFER)


def id_in_path(shown: str, what: str) -> bytes:
    """The id of a ``what`` (job, batch) in a path; raises NotFound for what is none."""
    found = read_id(shown)
    if found is None:
        raise NotFound(f"there is no {what} {shown[:64]}")
    return found


def read_cursor(cursor: str | None) -> bytes | None:
    """The id behind which a page begins, which is the ``next`` of the page before. Raises BadRequest."""
    found = None if cursor is None else read_id(cursor)
    if cursor is not None and found is None:
        raise BadRequest(f"cursor must be the 'next' of another page, got {cursor[:40]!r}")
    return found


def page(items: list[dict[str, Any]], limit: int) -> Response:
    """A page of a list; ``next`` is null at its end."""
    return json_response({"items": items, "next": items[-1]["id"] if len(items) == limit else None})


def json_response(document: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A document as JSON."""
    return Response(orjson.dumps(document), status, headers, "application/json")
