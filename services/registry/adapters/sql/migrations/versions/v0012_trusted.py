"""Names in a pickle or a skops file that the publisher of a version has trusted."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; existing versions have trusted nothing by name."""
    op.add_column("versions", sa.Column("trusted", sa.JSON, nullable=False, server_default="[]"))


def downgrade() -> None:
    """Drop the column."""
    op.drop_column("versions", "trusted")
