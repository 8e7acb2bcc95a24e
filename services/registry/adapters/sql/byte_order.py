"""Sort texts by their bytes, so that the order is the same in every database."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement


def exact(column: sa.ColumnElement[Any]) -> sa.ColumnElement[str]:
    """Return a text column that sorts by bytes. Without this, PostgreSQL sorts by the rules of a language."""
    return _Exact(column)


class _Exact(FunctionElement[str]):
    type = sa.String()
    inherit_cache = True


@compiles(_Exact)
def _compile_exact(element: Any, compiler: Any, **options: Any) -> str:
    return str(compiler.process(element.clauses, **options))


@compiles(_Exact, "postgresql")
def _compile_exact_postgresql(element: Any, compiler: Any, **options: Any) -> str:
    return f'({compiler.process(element.clauses, **options)} COLLATE "C")'
