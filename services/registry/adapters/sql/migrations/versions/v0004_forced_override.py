"""A column for replica overrides that may exceed a Deployment's maximum number of replicas."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column ``override_force`` to Deployments. For existing overrides, its value is False."""
    column = sa.Column("override_force", sa.Boolean, nullable=False, server_default=sa.false())
    op.add_column("deployments", column)


def downgrade() -> None:
    """Drop the column ``override_force`` of Deployments."""
    op.drop_column("deployments", "override_force")
