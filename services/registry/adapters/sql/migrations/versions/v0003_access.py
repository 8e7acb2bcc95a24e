"""Tables of API keys, the audit log, and usage."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_MOMENT = sa.DateTime(timezone=True)
_NAME = sa.String(63)
_DIGEST = sa.String(64)
_PRINCIPAL = sa.String(160)
_COUNTED = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Create the tables of API keys, of the audit log and of usage."""
    _keys()
    _audit()
    _usage()


def downgrade() -> None:
    """Drop the tables of API keys, of the audit log and of usage."""
    for table in ("usage_reports", "usage_daily", "audit", "api_keys"):
        op.drop_table(table)


def _keys() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("name", _NAME, nullable=False),
        sa.Column("digest", _DIGEST, nullable=False),
        sa.Column("previous_digest", _DIGEST),
        sa.Column("previous_until", _MOMENT),
        sa.Column("options", sa.JSON, nullable=False),
        sa.Column("created_at", _MOMENT, nullable=False),
        sa.Column("expires_at", _MOMENT),
        sa.Column("revoked_at", _MOMENT),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
    )
    op.create_index("ix_api_keys_revision", "api_keys", ["revision"])


def _audit() -> None:
    op.create_table(
        "audit",
        sa.Column("id", _COUNTED, nullable=False),
        sa.Column("at", _MOMENT, nullable=False),
        sa.Column("principal", _PRINCIPAL, nullable=False),
        sa.Column("principal_name", _PRINCIPAL, nullable=False),
        sa.Column("origin", sa.String(64), nullable=False),
        sa.Column("request_id", sa.String(128), nullable=False),
        sa.Column("action", sa.String(16), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("name", sa.String(96), nullable=False),
        sa.Column("before", sa.JSON),
        sa.Column("after", sa.JSON),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_audit"),
    )
    op.create_index("ix_audit_kind", "audit", ["kind", "name"])
    op.create_index("ix_audit_principal", "audit", ["principal"])


def _usage() -> None:
    counts = ("requests", "failed", "compute_us", "received_bytes", "sent_bytes", "tokens_in", "tokens_out")
    op.create_table(
        "usage_daily",
        sa.Column("day", sa.Date, nullable=False),
        sa.Column("principal", _PRINCIPAL, nullable=False),
        sa.Column("endpoint", _NAME, nullable=False),
        *(sa.Column(name, sa.BigInteger, nullable=False) for name in counts),
        sa.PrimaryKeyConstraint("day", "principal", "endpoint", name="pk_usage_daily"),
    )
    op.create_index("ix_usage_daily_principal", "usage_daily", ["principal", "day"])
    op.create_table(
        "usage_reports",
        sa.Column("incarnation", sa.String(32), nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False, autoincrement=False),
        sa.Column("taken_at", _MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("incarnation", "seq", name="pk_usage_reports"),
    )
    op.create_index("ix_usage_reports_taken_at", "usage_reports", ["taken_at"])
