"""Start the registry, or migrate its database: ``python -m services.registry [migrate]``."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import sys

from tidegate.kernel import quick_start

M_ARENA_MAX = -8  # as in malloc.h


def main(arguments: list[str]) -> None:
    """Serve the API. With the argument ``migrate``, migrate the database and exit."""
    if arguments not in ([], ["migrate"]):
        raise SystemExit("usage: python -m services.registry [migrate]")
    quick_start.begin()
    _share_arenas()
    from services.registry.adapters.sql import connection_problem, migrate
    from services.registry.settings import RegistrySettings
    from tidegate.kernel.blobs import object_store

    settings = RegistrySettings()
    object_store.require("registry", artifact_url=settings.artifact_url)
    url = settings.database_url
    if (wrong := connection_problem.of_url(url)) is not None:
        raise SystemExit(f"tidegate registry: {wrong}")
    try:
        problem = asyncio.run((migrate.migrate if arguments else migrate.problem)(url))
    except migrate.NewerDatabase as error:
        raise SystemExit(f"tidegate registry: {error}") from None
    except connection_problem.OPENING as error:
        raise SystemExit(f"tidegate registry: {connection_problem.of_error(url, error)}") from None
    if problem is not None:
        raise SystemExit(f"tidegate registry: {problem}")
    if arguments:
        return
    # These imports are here, because a migration does not need the modules, and imports take time.
    from services.registry.app import build
    from tidegate.kernel import telemetry
    from tidegate.kernel.service import app as service

    telemetry.configure("registry", settings.log_level)
    service.run(build(settings), settings, settings.registry_port)


def _share_arenas() -> None:
    """Limit glibc's malloc to two arenas.

    By default, each thread has an arena, and each arena keeps freed memory.
    """
    with contextlib.suppress(AttributeError, OSError):  # the C library is not glibc
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)


if __name__ == "__main__":
    main(sys.argv[1:])
