"""Pip requirements of versions."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; existing versions have no requirements."""
    # Adding a column is safe. For other changes, SQLite recreates the table, but other tables refer to it.
    op.add_column("versions", sa.Column("requirements", sa.JSON, nullable=False, server_default="[]"))


def downgrade() -> None:
    """Drop the column."""
    op.drop_column("versions", "requirements")
