"""Alembic's entry point: run the migrations on the connection in the configuration."""

from __future__ import annotations

from alembic import context

from services.registry.adapters.sql.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
    compare_type=True,
    transactional_ddl=True,
)
context.run_migrations()
