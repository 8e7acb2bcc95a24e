"""Tables for searches of versions by their metadata, and for model cards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

_NAME = sa.String(63)
_LONGEST_NAME = 255
_VERSIONS = sa.table(
    "versions", sa.column("model"), sa.column("number"), sa.column("metadata", sa.JSON)
)  # fmt: skip
# The fields of metadata that an earlier release does not know and would reject.
_NEW = (
    "framework", "framework_version", "commit", "run", "dataset", "parent", "parameters", "owner", "license",
)  # fmt: skip


def upgrade() -> None:
    """Create the tables of facts and model cards. Fill ``version_facts`` from all versions' metadata."""
    op.create_table(
        "version_facts",
        *_key(),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("name", sa.String(_LONGEST_NAME), nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("value", sa.Double),
        sa.PrimaryKeyConstraint("model", "number", "kind", "name", name="pk_version_facts"),
        _version("version_facts"),
    )
    op.create_index("ix_version_facts_kind", "version_facts", ["kind", "name", "value"])
    op.create_table(
        "model_cards",
        *_key(),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("model", "number", name="pk_model_cards"),
        _version("model_cards"),
    )
    rows = [fact for row in _stored() for fact in _facts(row.model, row.number, row.metadata)]
    facts = sa.table(
        "version_facts", *(sa.column(name) for name in ("model", "number", "kind", "name", "text", "value"))
    )
    for start in range(0, len(rows), 1_000):
        op.get_bind().execute(sa.insert(facts), rows[start : start + 1_000])


def downgrade() -> None:
    """Drop the two tables, and remove the fields of metadata that an earlier release would reject."""
    for row in _stored():
        kept = {name: value for name, value in row.metadata.items() if name not in _NEW}
        if kept != row.metadata:
            mine = (_VERSIONS.c.model == row.model) & (_VERSIONS.c.number == row.number)
            op.get_bind().execute(sa.update(_VERSIONS).where(mine).values(metadata=kept))
    for table in ("model_cards", "version_facts"):
        op.drop_table(table)


def _key() -> tuple[sa.Column[Any], sa.Column[Any]]:
    return (
        sa.Column("model", _NAME, nullable=False),
        sa.Column("number", sa.Integer, autoincrement=False, nullable=False),
    )


def _version(table: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(
        ["model", "number"], ["versions.model", "versions.number"], name=f"fk_{table}_model",
        ondelete="CASCADE",
    )  # fmt: skip


def _stored() -> list[Any]:
    return list(op.get_bind().execute(sa.select(_VERSIONS)).all())


def _facts(model: str, number: int, metadata: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the facts of one version.

    This is a copy of the domain's code. A migration must stay the same when that code changes.
    """
    key = {"model": model, "number": number}
    seen: set[tuple[str, str]] = set()

    def fact(kind: str, name: str, text: str, value: float | None) -> Iterator[dict[str, Any]]:
        short = name[:_LONGEST_NAME]
        if (kind, short) not in seen:
            seen.add((kind, short))
            yield {**key, "kind": kind, "name": short, "text": text, "value": value}

    for name, value in (metadata.get("metrics") or {}).items():
        if (number_ := _number(value)) is not None:
            yield from fact("metric", name, f"{number_:g}", number_)
    for name, value in (metadata.get("tags") or {}).items():
        text = value if isinstance(value, str) else json.dumps(value)
        yield from fact("tag", name, text, _number(text))
    if trained := metadata.get("trained_at"):
        yield from fact("field", "trained", trained, _seconds(trained))


def _number(value: Any) -> float | None:
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if abs(found) <= 1e300 else None


def _seconds(text: str) -> float | None:
    try:
        found = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return None
    return found.timestamp() if found.tzinfo else datetime.fromisoformat(f"{text}+00:00").timestamp()
