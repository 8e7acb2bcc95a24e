"""A column for the stage of a version, and a table of approvals."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column ``stage`` to versions, and create the table of approvals. No version has a stage yet."""
    op.add_column("versions", sa.Column("stage", sa.String(32)))
    op.create_table(
        "stage_approvals",
        sa.Column("model", sa.String(63), nullable=False),
        sa.Column("number", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("stage", sa.String(32), nullable=False),
        sa.Column("principal", sa.String(160), nullable=False),
        sa.Column("name", sa.String(160), nullable=False),
        sa.Column("comment", sa.Text, nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("model", "number", "stage", "principal", name="pk_stage_approvals"),
        sa.ForeignKeyConstraint(
            ["model", "number"], ["versions.model", "versions.number"], name="fk_stage_approvals_model",
            ondelete="CASCADE",
        ),
    )  # fmt: skip


def downgrade() -> None:
    """Drop the column ``stage`` of versions, and the table of approvals."""
    op.drop_table("stage_approvals")
    op.drop_column("versions", "stage")
