"""``python -m services.registry [migrate]``."""

from __future__ import annotations

import asyncio
import sys

from tidegate.kernel import quick_start


def main(arguments: list[str]) -> None:
    """Serve; with ``migrate``, migrate the database and exit."""
    if arguments not in ([], ["migrate"]):
        raise SystemExit("usage: python -m services.registry [migrate]")
    quick_start.begin()
    from services.registry.adapters.sql import migrate
    from services.registry.settings import RegistrySettings
    from tidegate.kernel.blobs import object_store

    settings = RegistrySettings()
    object_store.require("registry", artifact_url=settings.artifact_url)
    if arguments:
        asyncio.run(migrate.migrate(settings.database_url))
        return
    # Imported here, because the migration does not need these modules and every start waits for it.
    from services.registry.app import build
    from tidegate.kernel import telemetry
    from tidegate.kernel.service import app as service

    problem = asyncio.run(migrate.problem(settings.database_url))
    if problem is not None:
        raise SystemExit(f"tidegate registry: {problem}")
    telemetry.configure("registry", settings.log_level)
    service.run(build(settings), settings, settings.registry_port)


if __name__ == "__main__":
    main(sys.argv[1:])
