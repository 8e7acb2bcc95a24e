"""The registry's tables. The migrations create them. A test checks that tables and migrations agree."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.types import TypeDecorator


class Moment(TypeDecorator[datetime]):
    """Column type for times with a time zone. SQLite stores no zone, so values are stored as UTC."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """Convert a time to UTC before it is stored."""
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> datetime | None:
        """Add the zone UTC to a value without a zone."""
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
PRINCIPAL = sa.String(160)

# This table has one row, with the revision. Each write transaction first locks this row (SELECT FOR UPDATE),
# so only one transaction writes at a time.
revision = sa.Table(
    "revision",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("value", sa.BigInteger, nullable=False),
)

# ``pending_until``: until this time, an artifact is kept even if no version uses it.
artifacts = sa.Table(
    "artifacts",
    metadata,
    sa.Column("sha256", DIGEST, primary_key=True),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("created_at", Moment, nullable=False),
    sa.Column("pending_until", Moment),
)

# The cryptographic signatures of artifacts. A signature is a signed list of an artifact's files. An artifact
# has at most one signature for each key.
signatures = sa.Table(
    "signatures",
    metadata,
    sa.Column("sha256", DIGEST, sa.ForeignKey(artifacts.c.sha256, ondelete="CASCADE"), primary_key=True),
    sa.Column("key", DIGEST, primary_key=True),
    sa.Column("bundle", sa.JSON, nullable=False),
    sa.Column("created_at", Moment, nullable=False),
)

# The row of a deleted model stays, so that its version numbers are never used again. The name of a Deployment
# contains the version number. Workers, queues and route tables know a version only by this name. If a number
# were used again, they would mistake the new version for the deleted one.
models = sa.Table(
    "models",
    metadata,
    sa.Column("name", NAME, primary_key=True),
    sa.Column("last_number", sa.Integer, nullable=False),
    sa.Column("created_at", Moment, nullable=False),
)

# ``deleted_at``: when the version was deleted. Queries then ignore it, and its row is deleted after a grace
# time. ``created_by``: the id of the principal that registered the version.
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
    sa.Column("trusted", sa.JSON, nullable=False, server_default="[]"),
    sa.Column("metadata", sa.JSON, nullable=False),
    sa.Column("created_at", Moment, nullable=False),
    sa.Column("verification_state", sa.String(16), nullable=False, server_default="unchecked"),
    sa.Column("verification", sa.JSON(none_as_null=True)),
    sa.Column("deleted_at", Moment),
    sa.Column("created_by", PRINCIPAL, index=True),
    sa.Column("stage", sa.String(32)),
)

stage_approvals = sa.Table(
    "stage_approvals",
    metadata,
    sa.Column("model", NAME, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("stage", sa.String(32), primary_key=True),
    sa.Column("principal", PRINCIPAL, primary_key=True),
    sa.Column("name", PRINCIPAL, nullable=False),
    sa.Column("comment", sa.Text, nullable=False),
    sa.Column("at", Moment, nullable=False),
    sa.ForeignKeyConstraint(["model", "number"], ["versions.model", "versions.number"], ondelete="CASCADE"),
)

# The task of a version's scratch replica: a Deployment to run, and samples to answer.
verification_tasks = sa.Table(
    "verification_tasks",
    metadata,
    sa.Column("model", NAME, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("document", sa.JSON, nullable=False),
    sa.ForeignKeyConstraint(["model", "number"], ["versions.model", "versions.number"], ondelete="CASCADE"),
)

# The training baselines of versions: profiles of their training data.
baselines = sa.Table(
    "baselines",
    metadata,
    sa.Column("model", NAME, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("document", sa.JSON, nullable=False),
    sa.Column("sha256", DIGEST, nullable=False),
    sa.Column("created_at", Moment, nullable=False),
    sa.ForeignKeyConstraint(["model", "number"], ["versions.model", "versions.number"], ondelete="CASCADE"),
)

# A copy of the versions' metadata, as rows for searches. ``kind`` is metric, parameter, tag or field. Facts
# of the kind ``field`` are all others, such as the owner.
version_facts = sa.Table(
    "version_facts",
    metadata,
    sa.Column("model", NAME, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("kind", sa.String(16), primary_key=True),
    sa.Column("name", sa.String(255), primary_key=True),
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("value", sa.Double),
    sa.ForeignKeyConstraint(["model", "number"], ["versions.model", "versions.number"], ondelete="CASCADE"),
)

# The policy of a model: how many versions are kept, and the rules for their stages.
model_policies = sa.Table(
    "model_policies",
    metadata,
    sa.Column("model", NAME, sa.ForeignKey(models.c.name), primary_key=True),
    sa.Column("document", sa.JSON, nullable=False),
)

aliases = sa.Table(
    "aliases",
    metadata,
    sa.Column("model", NAME, primary_key=True),
    sa.Column("alias", sa.String(32), primary_key=True),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("moved_at", Moment, nullable=False),
    sa.ForeignKeyConstraint(["model", "number"], ["versions.model", "versions.number"]),
    sa.Index("ix_aliases_model", "model", "number"),
)

# A Markdown text about a version.
model_cards = sa.Table(
    "model_cards",
    metadata,
    sa.Column("model", NAME, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("created_at", Moment, nullable=False),
    sa.ForeignKeyConstraint(["model", "number"], ["versions.model", "versions.number"], ondelete="CASCADE"),
)

# ``declared``: a user created or replaced the Deployment by PUT or apply. Then its number of replicas does
# not change when an Endpoint's traffic moves to another version.
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
    sa.Column("override_force", sa.Boolean, nullable=False, server_default=sa.false()),
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

# Revoked keys stay, because usage and audit log refer to them. Only digests of secrets are stored.
api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("name", NAME, nullable=False),
    sa.Column("digest", DIGEST, nullable=False),
    sa.Column("previous_digest", DIGEST),
    sa.Column("previous_until", Moment),
    sa.Column("options", sa.JSON, nullable=False),
    sa.Column("created_at", Moment, nullable=False),
    sa.Column("expires_at", Moment),
    sa.Column("revoked_at", Moment),
    sa.Column("revision", sa.BigInteger, nullable=False, index=True),
)

# The type of generated ids. SQLite generates ids only for columns of type INTEGER.
COUNTED = sa.BigInteger().with_variant(sa.Integer, "sqlite")

# The audit log: all changes of the desired state and of keys.
audit = sa.Table(
    "audit",
    metadata,
    sa.Column("id", COUNTED, primary_key=True),
    sa.Column("at", Moment, nullable=False),
    sa.Column("principal", PRINCIPAL, nullable=False, index=True),
    sa.Column("principal_name", PRINCIPAL, nullable=False),
    sa.Column("origin", sa.String(64), nullable=False),
    sa.Column("request_id", sa.String(128), nullable=False),
    sa.Column("action", sa.String(16), nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("name", sa.String(96), nullable=False),
    sa.Column("before", sa.JSON(none_as_null=True)),
    sa.Column("after", sa.JSON(none_as_null=True)),
    sa.Column("revision", sa.BigInteger, nullable=False),
    sa.Index("ix_audit_kind", "kind", "name"),
)

# Usage by day (UTC).
usage_daily = sa.Table(
    "usage_daily",
    metadata,
    sa.Column("day", sa.Date, primary_key=True),
    sa.Column("principal", PRINCIPAL, primary_key=True),
    sa.Column("endpoint", NAME, primary_key=True),
    sa.Column("requests", sa.BigInteger, nullable=False),
    sa.Column("failed", sa.BigInteger, nullable=False),
    sa.Column("compute_us", sa.BigInteger, nullable=False),
    sa.Column("received_bytes", sa.BigInteger, nullable=False),
    sa.Column("sent_bytes", sa.BigInteger, nullable=False),
    sa.Column("tokens_in", sa.BigInteger, nullable=False),
    sa.Column("tokens_out", sa.BigInteger, nullable=False),
    sa.Index("ix_usage_daily_principal", "principal", "day"),
)

# The ids of reports that were added to ``usage_daily``, so that a redelivered report is not added again.
usage_reports = sa.Table(
    "usage_reports",
    metadata,
    sa.Column("incarnation", sa.String(32), primary_key=True),
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("taken_at", Moment, nullable=False, index=True),
)

# Uploads in progress. ``received``: the number of stored bytes. ``parts``: the names of the stored objects.
uploads = sa.Table(
    "uploads",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("owner", PRINCIPAL, nullable=False, index=True),
    sa.Column("sha256", DIGEST, nullable=False),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("received", sa.BigInteger, nullable=False),
    sa.Column("parts", sa.JSON, nullable=False),
    sa.Column("stored", sa.Boolean, nullable=False),
    sa.Column("problem", sa.Text, nullable=False),
    sa.Column("created_at", Moment, nullable=False),
    sa.Column("touched_at", Moment, nullable=False, index=True),
)

# The running replicas, each with the artifact that it may read.
running_replicas = sa.Table(
    "running_replicas",
    metadata,
    sa.Column("replica", sa.String(255), primary_key=True),
    sa.Column("sha256", DIGEST, nullable=False),
)
