"""Two columns of versions (deletion time and registering principal), and a table of policies."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add two columns to versions, and create the table of policies. No version is marked as deleted yet."""
    op.add_column("versions", sa.Column("deleted_at", sa.DateTime(timezone=True)))
    op.add_column("versions", sa.Column("created_by", sa.String(160)))
    op.create_index("ix_versions_created_by", "versions", ["created_by"])
    op.create_table(
        "model_policies",
        sa.Column("model", sa.String(63), nullable=False),
        sa.Column("document", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("model", name="pk_model_policies"),
        sa.ForeignKeyConstraint(["model"], ["models.name"], name="fk_model_policies_model"),
    )


def downgrade() -> None:
    """Drop the two columns and the table of policies. This restores versions that are marked as deleted."""
    op.drop_table("model_policies")
    op.drop_index("ix_versions_created_by", "versions")
    op.drop_column("versions", "created_by")
    op.drop_column("versions", "deleted_at")
