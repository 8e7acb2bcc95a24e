"""Columns and a table for the verification of versions. Existing versions are unchecked and may serve."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

_NAME = sa.String(63)


def upgrade() -> None:
    """Add the columns of the verification to versions. Create the table for the tasks of scratch replicas."""
    state = sa.Column("verification_state", sa.String(16), nullable=False, server_default="unchecked")
    op.add_column("versions", state)
    op.add_column("versions", sa.Column("verification", sa.JSON(none_as_null=True)))
    op.create_table(
        "verification_tasks",
        sa.Column("model", _NAME, nullable=False),
        sa.Column("number", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("document", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("model", "number", name="pk_verification_tasks"),
        sa.ForeignKeyConstraint(
            ["model", "number"], ["versions.model", "versions.number"],
            name="fk_verification_tasks_model", ondelete="CASCADE",
        ),
    )  # fmt: skip


def downgrade() -> None:
    """Drop the table of the tasks, and the columns of the verification."""
    op.drop_table("verification_tasks")
    op.drop_column("versions", "verification")
    op.drop_column("versions", "verification_state")
