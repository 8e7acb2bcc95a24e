"""A table for the cryptographic signatures of artifacts."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table ``signatures``."""
    op.create_table(
        "signatures",
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("bundle", sa.JSON, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("sha256", "key", name="pk_signatures"),
        sa.ForeignKeyConstraint(
            ["sha256"], ["artifacts.sha256"], name="fk_signatures_sha256", ondelete="CASCADE"
        ),
    )


def downgrade() -> None:
    """Drop the table ``signatures``."""
    op.drop_table("signatures")
