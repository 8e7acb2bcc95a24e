"""A column for the names in a pickle or skops file that a version's publisher trusts."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column ``trusted`` to versions. It is empty for existing versions."""
    op.add_column("versions", sa.Column("trusted", sa.JSON, nullable=False, server_default="[]"))


def downgrade() -> None:
    """Drop the column ``trusted`` of versions."""
    op.drop_column("versions", "trusted")
