"""A table for the training baselines of versions."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_NAME = sa.String(63)


def upgrade() -> None:
    """Create the table ``baselines``."""
    op.create_table(
        "baselines",
        sa.Column("model", _NAME, nullable=False),
        sa.Column("number", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("document", sa.JSON, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("model", "number", name="pk_baselines"),
        sa.ForeignKeyConstraint(
            ["model", "number"], ["versions.model", "versions.number"], name="fk_baselines_model",
            ondelete="CASCADE",
        ),
    )  # fmt: skip


def downgrade() -> None:
    """Drop the table ``baselines``."""
    op.drop_table("baselines")
