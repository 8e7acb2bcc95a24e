"""Tables of the desired state: models, versions, artifacts, Deployments, Endpoints."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_MOMENT = sa.DateTime(timezone=True)
_NAME = sa.String(63)


def upgrade() -> None:
    """Create the tables of the desired state, and the row with revision 0."""
    counter = op.create_table(
        "revision",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("value", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_revision"),
    )
    assert counter is not None
    op.bulk_insert(counter, [{"id": 1, "value": 0}])
    _models()
    _deployments()
    _endpoints()


def downgrade() -> None:
    """Drop the tables of the desired state. Tables that refer to other tables are dropped first."""
    for table in (
        "endpoint_targets", "endpoints", "deployments", "versions", "models", "artifacts", "revision",
    ):  # fmt: skip
        op.drop_table(table)


def _models() -> None:
    op.create_table(
        "artifacts",
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("created_at", _MOMENT, nullable=False),
        sa.Column("pending_until", _MOMENT),
        sa.PrimaryKeyConstraint("sha256", name="pk_artifacts"),
    )
    op.create_table(
        "models",
        sa.Column("name", _NAME, nullable=False),
        sa.Column("last_number", sa.Integer, nullable=False),
        sa.Column("created_at", _MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_models"),
    )
    op.create_table(
        "versions",
        sa.Column("model", _NAME, nullable=False),
        sa.Column("number", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("format", sa.String(16), nullable=False),
        sa.Column("artifact_sha256", sa.String(64), nullable=False),
        sa.Column("filename", sa.String(255), nullable=False),
        sa.Column("signature", sa.JSON),
        sa.Column("metadata", sa.JSON, nullable=False),
        sa.Column("created_at", _MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("model", "number", name="pk_versions"),
        sa.ForeignKeyConstraint(["model"], ["models.name"], name="fk_versions_model"),
        sa.ForeignKeyConstraint(
            ["artifact_sha256"], ["artifacts.sha256"], name="fk_versions_artifact_sha256"
        ),
    )
    op.create_index("ix_versions_artifact_sha256", "versions", ["artifact_sha256"])


def _deployments() -> None:
    op.create_table(
        "deployments",
        sa.Column("name", _NAME, nullable=False),
        sa.Column("model", _NAME, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("options", sa.JSON, nullable=False),
        sa.Column("declared", sa.Boolean, nullable=False),
        sa.Column("override_replicas", sa.Integer),
        sa.Column("override_expires_at", _MOMENT),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("created_at", _MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_deployments"),
        sa.ForeignKeyConstraint(
            ["model", "version"], ["versions.model", "versions.number"], name="fk_deployments_model"
        ),
    )
    op.create_index("ix_deployments_model", "deployments", ["model", "version"])


def _endpoints() -> None:
    op.create_table(
        "endpoints",
        sa.Column("name", _NAME, nullable=False),
        sa.Column("options", sa.JSON, nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("created_at", _MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_endpoints"),
    )
    op.create_table(
        "endpoint_targets",
        sa.Column("endpoint", _NAME, nullable=False),
        sa.Column("role", sa.String(8), nullable=False),
        sa.Column("position", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("deployment", _NAME, nullable=False),
        sa.Column("weight", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("endpoint", "role", "position", name="pk_endpoint_targets"),
        sa.ForeignKeyConstraint(
            ["endpoint"], ["endpoints.name"], name="fk_endpoint_targets_endpoint", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["deployment"], ["deployments.name"], name="fk_endpoint_targets_deployment"),
    )
    op.create_index("ix_endpoint_targets_deployment", "endpoint_targets", ["deployment"])
