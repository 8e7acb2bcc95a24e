"""Drop the index ``ix_version_facts_kind``, because it made searches slower.

The index covers the kind, name and value of each fact. With outdated table statistics, PostgreSQL used the
index instead of the faster primary key.
"""

from __future__ import annotations

from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Drop the index of the facts by kind, name and value."""
    op.drop_index("ix_version_facts_kind", "version_facts")


def downgrade() -> None:
    """Create the index of the facts again."""
    op.create_index("ix_version_facts_kind", "version_facts", ["kind", "name", "value"])
