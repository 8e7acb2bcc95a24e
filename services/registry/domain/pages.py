"""Cursors of lists: the last object of a page, as opaque text. Pure."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any

from tidegate.kernel.errors import BadRequest

# The largest page, and the size of a page if the request has no limit.
MOST = 1_000
DEFAULT = 100
LONGEST = 4_000


def cursor_of(order: str, *last: Any) -> str:
    """Return the cursor of the next page. ``last`` are the sort keys of the last object of this page."""
    return base64.urlsafe_b64encode(json.dumps([order, *last]).encode()).decode().rstrip("=")


def read_cursor(cursor: str | None, order: str, length: int) -> list[Any] | None:
    """Return the ``length`` sort keys in a cursor; None for no cursor. Raise BadRequest."""
    if cursor is None:
        return None
    try:
        if len(cursor) > LONGEST:
            raise ValueError
        found = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
    except (ValueError, binascii.Error, RecursionError):
        found = None
    if not isinstance(found, list) or len(found) != length + 1 or not all(map(_plain, found)):
        raise BadRequest("cursor must be the `next` of the previous page. Leave it out for the first page.")
    if found[0] != order:
        raise BadRequest("The cursor is of a list with another order. Repeat the first page without cursor.")
    return found[1:]


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)
