"""A column for the pip requirements of versions."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column ``requirements`` to versions. Existing versions have no requirements."""
    # Do not use a batch operation of Alembic here. It would recreate the table, which fails because other
    # tables refer to it. SQLite can add a column in place.
    op.add_column("versions", sa.Column("requirements", sa.JSON, nullable=False, server_default="[]"))


def downgrade() -> None:
    """Drop the column ``requirements`` of versions."""
    op.drop_column("versions", "requirements")
