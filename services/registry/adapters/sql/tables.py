"""The registry's tables. The migrations make them; a test holds the two together."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.types import TypeDecorator


class Moment(TypeDecorator[datetime]):
    """A point in time, always with its zone: SQLite keeps none, so it is written and read as UTC."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """To UTC."""
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> datetime | None:
        """With its zone again."""
        if not isinstance(value, datetime):
            return None
        return value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)


metadata = sa.MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
    }
)

NAME = sa.String(63)
DIGEST = sa.String(64)

# One row. Whoever writes takes it first, so it is also the lock that makes writers take turns.
revision = sa.Table(
    "revision",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("value", sa.BigInteger, nullable=False),
)

# ``pending_until``: uploaded, and not yet named by a version; kept at least until then.
artifacts = sa.Table(
    "artifacts",
    metadata,
    sa.Column("sha256", DIGEST, primary_key=True),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("created_at", Moment, nullable=False),
    sa.Column("pending_until", Moment),
)

# A row outlives its model: a number once given is never given to other bytes, because workers,
# queues and route tables know a Deployment by a name that is made of it.
models = sa.Table(
    "models",
    metadata,
    sa.Column("name", NAME, primary_key=True),
    sa.Column("last_number", sa.Integer, nullable=False),
    sa.Column("created_at", Moment, nullable=False),
)

versions = sa.Table(
    "versions",
    metadata,
    sa.Column("model", NAME, sa.ForeignKey(models.c.name), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("format", sa.String(16), nullable=False),
    sa.Column("artifact_sha256", DIGEST, sa.ForeignKey(artifacts.c.sha256), nullable=False, index=True),
    sa.Column("filename", sa.String(255), nullable=False),
    sa.Column("signature", sa.JSON(none_as_null=True)),
    sa.Column("requirements", sa.JSON, nullable=False, server_default="[]"),
    sa.Column("metadata", sa.JSON, nullable=False),
    sa.Column("created_at", Moment, nullable=False),
)

# ``declared``: stated by a person, so a roll-over does not touch its scale.
deployments = sa.Table(
    "deployments",
    metadata,
    sa.Column("name", NAME, primary_key=True),
    sa.Column("model", NAME, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("options", sa.JSON, nullable=False),
    sa.Column("declared", sa.Boolean, nullable=False),
    sa.Column("override_replicas", sa.Integer),
    sa.Column("override_expires_at", Moment),
    sa.Column("revision", sa.BigInteger, nullable=False),
    sa.Column("created_at", Moment, nullable=False),
    sa.ForeignKeyConstraint(["model", "version"], ["versions.model", "versions.number"]),
    sa.Index("ix_deployments_model", "model", "version"),
)

endpoints = sa.Table(
    "endpoints",
    metadata,
    sa.Column("name", NAME, primary_key=True),
    sa.Column("options", sa.JSON, nullable=False),
    sa.Column("revision", sa.BigInteger, nullable=False),
    sa.Column("created_at", Moment, nullable=False),
)

endpoint_targets = sa.Table(
    "endpoint_targets",
    metadata,
    sa.Column("endpoint", NAME, sa.ForeignKey(endpoints.c.name, ondelete="CASCADE"), primary_key=True),
    sa.Column("role", sa.String(8), primary_key=True),  # "target" or "previous"
    sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("deployment", NAME, sa.ForeignKey(deployments.c.name), nullable=False, index=True),
    sa.Column("weight", sa.Integer, nullable=False),
)
