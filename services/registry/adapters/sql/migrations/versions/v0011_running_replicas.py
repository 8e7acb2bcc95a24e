"""A table for the running replicas, so that all registries can check what a replica may read."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table ``running_replicas``."""
    op.create_table(
        "running_replicas",
        sa.Column("replica", sa.String(255), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("replica", name="pk_running_replicas"),
    )


def downgrade() -> None:
    """Drop the table ``running_replicas``."""
    op.drop_table("running_replicas")
