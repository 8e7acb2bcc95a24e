"""Versions bring pip requirements."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Versions that are there have none."""
    # In place: SQLite would make the table anew for anything more, and others refer to it.
    op.add_column("versions", sa.Column("requirements", sa.JSON, nullable=False, server_default="[]"))


def downgrade() -> None:
    """Forget them."""
    op.drop_column("versions", "requirements")
