"""Queries of usage, and the result as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from tidegate.kernel.protocol.usage import COUNTS

BY = ("day", "principal", "endpoint")


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """A query of usage from ``since`` to ``until``, both days included.

    ``by``: the columns to group by. Rows with the same values in these columns are added up.
    """

    since: date | None = None
    until: date | None = None
    principal: str | None = None
    endpoint: str | None = None
    by: tuple[str, ...] = BY


def as_csv(rows: Sequence[Mapping[str, Any]], by: Sequence[str]) -> str:
    """Return rows as CSV with a header line. Cells that a spreadsheet would run as formulas are escaped."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    columns = [*by, *(["principal_name"] if "principal" in by else []), *COUNTS]
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_escape_formula(row[column]) for column in columns])
    return out.getvalue()


def _escape_formula(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value[:1] in "=+-@\t\r" and value else value
