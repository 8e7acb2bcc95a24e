"""Explain in one line why a database cannot be opened, and how to fix it.

Passwords are not shown.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DBAPIError, InvalidRequestError, SQLAlchemyError

SETTING = "TIDEGATE_DATABASE_URL"
DRIVERS = {"sqlite+aiosqlite", "postgresql+asyncpg"}
FORMS = "Write sqlite+aiosqlite:///FILE or postgresql+asyncpg://USER:PASSWORD@HOST/DATABASE"
# The errors that opening a database may raise, from its driver or from the network.
OPENING = (SQLAlchemyError, OSError, ImportError, ValueError, TimeoutError)
# PostgreSQL's error codes (SQL states).
WRONG_PASSWORD, NO_USER, NO_DATABASE, NO_RIGHT = "28P01", "28000", "3D000", "42501"


def of_url(url: str) -> str | None:
    """Return why a URL is not valid for the registry's database; None if it is valid. Do not connect."""
    try:
        parsed = sa.make_url(url)
    except (ArgumentError, ValueError):
        return f"{SETTING} is not the URL of a database. {FORMS}."
    if parsed.drivername not in DRIVERS:
        return f"{SETTING} begins with {parsed.drivername}://, and no driver for it is installed. {FORMS}."
    return None


def of_error(url: str, error: BaseException) -> str:
    """Return a message for an ``error`` that was raised while the database at ``url`` was opened."""
    parsed = sa.make_url(url)
    cause = error.orig if isinstance(error, DBAPIError) and error.orig else error
    if parsed.get_backend_name() == "sqlite":
        return f"The database {parsed.database} cannot be opened: {_first_line(cause)}. Check {SETTING}."
    host = parsed.host or parsed.query.get("host") or "localhost"
    server = f"PostgreSQL at {host}:{parsed.port or 5432}"
    state = _state(cause)
    if state in (WRONG_PASSWORD, NO_USER):
        return (
            f"{server} refuses the user {parsed.username!r}: {_first_line(cause)}. Correct the user and the "
            f"password in {SETTING}."
        )
    if state == NO_DATABASE:
        return (
            f"{server} has no database {parsed.database!r}. Create it, for example with "
            f"`createdb -h {host} -U {parsed.username} {parsed.database}`, or correct {SETTING}."
        )
    if state == NO_RIGHT:
        return (
            f"{server} does not let the user {parsed.username!r} do this: {_first_line(cause)}. Make this "
            f"user the owner of the database {parsed.database!r}."
        )
    if isinstance(cause, OSError) or "connect" in type(cause).__name__.lower():
        why = _first_line(cause) or "it did not answer in time"
        return (
            f"{server} does not answer: {why}. Check the host and the port in {SETTING}, and that "
            "PostgreSQL runs there."
        )
    if isinstance(cause, InvalidRequestError | ImportError):
        return f"{SETTING} cannot be used: {_first_line(cause)}. {FORMS}."
    return f"The database at {host} cannot be opened: {_first_line(cause)}. Check {SETTING}."


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


def _state(error: BaseException) -> str | None:
    # SQLAlchemy wraps the driver's error, which stays available as the cause.
    for each in (error, error.__cause__):
        if (state := getattr(each, "sqlstate", None)) is not None:
            return str(state)
    return None
