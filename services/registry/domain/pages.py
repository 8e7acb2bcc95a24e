"""Pages of lists. A cursor has the sort keys of the last object of a page, as opaque text. Pure."""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from tidegate.kernel.errors import BadRequest

# Numbers of objects on a page. MOST: the highest allowed number, and the API's default. DEFAULT: the default
# of searches inside the registry.
MOST = 1_000
DEFAULT = 100
LONGEST = 4_000
# Limits for the numbers in a cursor. MOST_NUMBER: the largest sort key, which is about the largest float.
# MOST_INTEGER: the largest version number.
MOST_NUMBER = 1.8e308
MOST_INTEGER = 2**31 - 1


_BY_NAME = "name"


class Named(Protocol):
    """An object with a name."""

    @property
    def name(self) -> str: ...


N = TypeVar("N", bound=Named)


@dataclass(frozen=True, slots=True)
class NamedPage:
    """A page of a list sorted by name.

    ``limit``: how many objects the page can have; None: all. ``after``: the last name of the previous page.
    """

    limit: int | None = None
    after: str | None = None

    @property
    def most(self) -> int | None:
        """Return how many objects to read: one more than the limit, to find out if a next page exists."""
        return None if self.limit is None else self.limit + 1

    def split(self, found: list[N]) -> tuple[list[N], str | None]:
        """Return the objects of the page, and the cursor of the next page; None on the last page."""
        if self.limit is None or len(found) <= self.limit:
            return found, None
        page = found[: self.limit]
        return page, cursor_of(_BY_NAME, page[-1].name)


EVERYTHING = NamedPage()


def named_page(limit: int | None, cursor: str | None) -> NamedPage:
    """Return the page with this limit and cursor. Raise BadRequest for an invalid cursor."""
    last = read_cursor(cursor, _BY_NAME, str)
    return NamedPage(limit, None if last is None else last[0])


def cursor_of(order: str, *last: Any) -> str:
    """Return the cursor of the next page. ``last`` are the sort keys of the last object of this page."""
    return base64.urlsafe_b64encode(json.dumps([order, *last]).encode()).decode().rstrip("=")


def read_cursor(cursor: str | None, order: str, *types: type) -> list[Any] | None:
    """Return the sort keys in a cursor; None for no cursor. Raise BadRequest for an invalid cursor.

    ``types``: the types of the sort keys. They are checked here, because a database would reject a wrong type
    only during the query, with an error that does not name the cursor.
    """
    if cursor is None:
        return None
    try:
        if len(cursor) > LONGEST:
            raise ValueError
        found = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
    except (ValueError, binascii.Error, RecursionError):
        found = None
    if not isinstance(found, list) or len(found) != len(types) + 1 or not isinstance(found[0], str):
        found = None
    elif found[0] != order:
        raise BadRequest(
            "The cursor belongs to a list with another order. Begin again with the first page, without a "
            "cursor."
        )
    if found is None or not all(map(_is, found[1:], types)):
        raise BadRequest("cursor must be the `next` of the previous page. Leave it out for the first page.")
    return list(found[1:])


def _is(value: Any, type_: type) -> bool:
    if isinstance(value, bool):
        return False
    if type_ is float:
        return value is None or (isinstance(value, int | float) and abs(value) <= MOST_NUMBER)
    if type_ is int:
        return isinstance(value, int) and abs(value) <= MOST_INTEGER
    return value is None or (isinstance(value, str) and _is_text(value))


def _is_text(value: str) -> bool:
    """Return True if a database can store a text: it has no NUL character and no lone surrogate."""
    return "\0" not in value and value.encode(errors="ignore").decode() == value
