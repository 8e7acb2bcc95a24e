"""Run registry, autoscaler and router in one process: ``python -m services.control``.

The three services share the interpreter, the libraries and one event loop, which saves the memory of two
processes. Each service keeps its own port, credentials and HTTP routes, so the other services need no change.
"""

from __future__ import annotations

import asyncio
import sys

from tidegate.kernel import quick_start


def main() -> int:
    """Serve until a signal ends the process. Return the exit code."""
    quick_start.begin()
    from services.autoscaler import app as autoscaler
    from services.autoscaler.settings import AutoscalerSettings
    from services.registry import app as registry
    from services.registry.adapters.sql import migrate
    from services.registry.settings import RegistrySettings
    from services.router import app as router
    from services.router.settings import RouterSettings
    from tidegate.kernel import telemetry
    from tidegate.kernel.blobs import object_store
    from tidegate.kernel.service.together import Part, run

    registered, routed, scaled = RegistrySettings(), RouterSettings(), AutoscalerSettings()
    object_store.require("registry", artifact_url=registered.artifact_url)
    object_store.require("router", blob_url=routed.blob_url)
    telemetry.configure("control", registered.log_level)
    problem = asyncio.run(migrate.problem(registered.database_url))
    if problem is not None:
        raise SystemExit(f"tidegate registry: {problem}")
    # The registry starts first and stops last, because the other services read it. The autoscaler stops
    # first.
    return run(
        [
            Part(registry.build(registered), registered, registered.registry_port),
            Part(router.build(routed), routed, routed.router_port),
            Part(autoscaler.build(scaled), scaled, scaled.autoscaler_port),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
