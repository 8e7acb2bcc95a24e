"""A column for the names that a version's pickle or skops file may import.

A publisher has declared that these names are trusted, although they can be dangerous.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column ``trusted`` to versions. For existing versions, the list in it is empty."""
    op.add_column("versions", sa.Column("trusted", sa.JSON, nullable=False, server_default="[]"))


def downgrade() -> None:
    """Drop the column ``trusted`` of versions."""
    op.drop_column("versions", "trusted")
