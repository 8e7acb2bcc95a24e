"""Search versions in SQL. Every value of a filter is a bound parameter."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from services.registry.adapters.sql.byte_order import exact
from services.registry.adapters.sql.reading import LIVE, version_of
from services.registry.adapters.sql.tables import Moment, aliases, artifacts, version_facts, versions
from services.registry.domain import pages
from services.registry.domain.filters import Condition, Order, Subject, Value
from services.registry.domain.version_metadata import seconds
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.models import Version

# This is a subquery by the primary key and not a join. For a join, PostgreSQL's planner may read all
# artifacts for each version.
_SIZE = sa.select(artifacts.c.size).where(artifacts.c.sha256 == versions.c.artifact_sha256)

_COLUMNS: dict[str, sa.ColumnElement[Any]] = {
    "model": versions.c.model,
    "number": versions.c.number,
    "format": versions.c.format,
    "sha256": versions.c.artifact_sha256,
    "size": _SIZE.correlate(versions).scalar_subquery(),
    "stage": versions.c.stage,
    "verification": versions.c.verification_state,
    "registered_by": versions.c.created_by,
    "created": versions.c.created_at,
}

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_COMPARISONS: dict[str, Callable[[Any, Any], sa.ColumnElement[bool]]] = {
    "=": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}


@dataclass(frozen=True, slots=True)
class Search:
    """A search of versions.

    ``order`` None: sort by model and number. ``cursor``: ``next`` of the previous page.
    ``deleted``: find only deleted versions that can be restored.
    """

    conditions: Sequence[Condition] = ()
    order: Order | None = None
    limit: int = pages.DEFAULT
    cursor: str | None = None
    deleted: bool = False


async def find(connection: AsyncConnection, search: Search) -> tuple[list[Version], str | None]:
    """Return a page of the versions that meet all conditions, and the cursor of the next page.

    On the last page, the cursor is None.
    """
    key = _sort_key(search.order)
    found = sa.select(versions, _COLUMNS["size"].label("artifact_size"), key.label("sort_key"))
    found = found.where(_state(search))
    for condition in search.conditions:
        found = found.where(_where(condition))
    descending = search.order is not None and search.order.descending
    ordered = str(search.order)
    last = pages.read_cursor(search.cursor, ordered, _type_of(search.order), str, int)
    if last is not None:
        found = found.where(_after(key, last, descending=descending, order=search.order))
    keys = (exact(versions.c.model), versions.c.number)
    if search.order is not None:
        found = found.order_by((key.desc() if descending else key.asc()).nulls_last())
    found = found.order_by(*(each.desc() if descending else each.asc() for each in keys))
    rows = (await connection.execute(found.limit(search.limit + 1))).mappings().all()
    page = rows[: search.limit]
    following = None
    if len(rows) > search.limit:
        end = page[-1]
        following = pages.cursor_of(ordered, _plain(end["sort_key"]), end["model"], end["number"])
    return [version_of(row) for row in page], following


async def models_page(
    connection: AsyncConnection, search: Search, named: str | None
) -> tuple[list[str], str | None]:
    """Return a page of model names, and the cursor of the next page. On the last page, it is None.

    Each of the models has a version that meets all conditions. ``named``: a text that the names must contain.
    """
    name = exact(versions.c.model)
    query = sa.select(name.label("name")).select_from(versions).where(_state(search))
    if named:
        query = query.where(_like(versions.c.model, f"%{_escaped(named)}%"))
    for condition in search.conditions:
        query = query.where(_where(condition))
    last = pages.read_cursor(search.cursor, "models", str)
    if last is not None:
        query = query.where(name > str(last[0]))
    query = query.distinct().order_by(sa.text("name")).limit(search.limit + 1)
    found = list((await connection.execute(query)).scalars())
    page = found[: search.limit]
    return page, pages.cursor_of("models", page[-1]) if len(found) > len(page) else None


def _state(search: Search) -> sa.ColumnElement[bool]:
    return ~LIVE if search.deleted else LIVE


def _sort_key(order: Order | None) -> sa.ColumnElement[Any]:
    if order is None:
        return sa.literal(0)
    by_text = order.subject.type == "text"
    if order.subject.kind == "column":
        key = _COLUMNS[order.subject.name]
    else:
        key = _fact(order.subject, by_text=by_text)
    return exact(key) if by_text else key


def _after(
    key: sa.ColumnElement[Any], last: list[Any], *, descending: bool, order: Order | None
) -> sa.ColumnElement[bool]:
    """Return the condition for the versions that follow a page.

    ``last``: the sort key, model and number of the page's last version. Versions without a sort key come
    last.
    """
    value, model, number = last
    name = exact(versions.c.model)

    beyond = _COMPARISONS["<" if descending else ">"]

    tie = sa.or_(beyond(name, str(model)), sa.and_(name == str(model), beyond(versions.c.number, number)))
    if order is None:
        return tie
    if value is None:
        return sa.and_(key.is_(None), tie)
    bound = _bound(value, order.subject)
    return sa.or_(beyond(key, bound), sa.and_(key == bound, tie), key.is_(None))


def _type_of(order: Order | None) -> type:
    """Return the type that a sort key has in a cursor. A time is a number of microseconds there."""
    return str if order is not None and order.subject.type == "text" else float


def _bound(value: Any, subject: Subject) -> Any:
    if subject.kind == "column" and subject.type == "time":
        try:
            return sa.literal(_EPOCH + timedelta(microseconds=value), Moment)
        except OverflowError:
            raise BadRequest("cursor must be the `next` of the previous page.") from None
    return sa.literal(float(value), sa.Double) if isinstance(value, int | float) else value


def _plain(value: Any) -> Any:
    """Return a sort key as a JSON value. A time becomes whole microseconds, so that it stays exact."""
    return (value - _EPOCH) // timedelta(microseconds=1) if isinstance(value, datetime) else value


def _where(condition: Condition) -> sa.ColumnElement[bool]:
    subject = condition.subject
    if subject.kind == "alias":
        named = (aliases.c.model == versions.c.model) & (aliases.c.number == versions.c.number)
        if condition.operator == "null":
            return ~sa.exists().where(named)
        if condition.operator == "not null":
            return sa.exists().where(named)
        return sa.exists().where(named, _compared(aliases.c.alias, condition))
    if subject.kind == "column":
        return _compared(_COLUMNS[subject.name], condition)
    numeric = any(isinstance(value, float | datetime) for value in condition.values)
    return _compared(_fact(subject, by_text=not numeric), condition)


def _fact(subject: Subject, *, by_text: bool) -> sa.ColumnElement[Any]:
    """Return an expression for the value of a version's fact; null if the version lacks the fact.

    The expression is a scalar subquery by the primary key, and not an EXISTS. With outdated table statistics,
    PostgreSQL may run an EXISTS as a slow join.
    """
    fact = version_facts.alias()
    mine = (
        (fact.c.model == versions.c.model)
        & (fact.c.number == versions.c.number)
        & (fact.c.kind == subject.kind)
        & (fact.c.name == subject.name)
    )
    column: sa.ColumnElement[Any] = fact.c.text if by_text else fact.c.value
    return sa.select(column).where(mine).correlate(versions).scalar_subquery()


def _compared(column: sa.ColumnElement[Any], condition: Condition) -> sa.ColumnElement[bool]:
    values = [_parameter(column, value) for value in condition.values]
    match condition.operator:
        case "in":
            return column.in_(values)
        case "like":
            return _like(column, str(values[0]))
        case "null":
            return column.is_(None)
        case "not null":
            return column.is_not(None)
    return _COMPARISONS[condition.operator](column, values[0])


def _parameter(column: sa.ColumnElement[Any], value: Value) -> Any:
    if isinstance(value, datetime) and not isinstance(column.type, Moment):
        return seconds(value)
    if isinstance(value, float) and isinstance(column.type, sa.Integer):
        return sa.literal(value, sa.Double)  # the column is an integer, but the value may be 2.5
    return value


def _like(column: sa.ColumnElement[Any], pattern: str) -> sa.ColumnElement[bool]:
    return sa.func.lower(column).like(pattern.lower(), escape="\\")


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
