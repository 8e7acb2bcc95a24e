"""Run the gateway: ``python -m services.gateway [--workers N]``."""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from typing import TYPE_CHECKING

from tidegate.kernel import quick_start

if TYPE_CHECKING:
    from services.gateway.settings import GatewaySettings


def main() -> int:
    """Serve until a signal stops the process."""
    quick_start.begin()
    from services.gateway import processes
    from services.gateway.settings import GatewaySettings
    from tidegate.kernel import telemetry
    from tidegate.kernel.blobs import object_store

    settings = GatewaySettings()
    object_store.require("gateway", blob_url=settings.blob_url, async_url=settings.async_url)
    parser = argparse.ArgumentParser(prog="services.gateway", description="The gateway.")
    parser.add_argument(
        "--workers",
        type=int,
        default=settings.gateway_workers,
        help="number of gateway processes, which share the port (default: %(default)s)",
    )
    workers: int = parser.parse_args().workers
    telemetry.configure("gateway", settings.log_level)
    member = processes.MEMBER in os.environ
    if workers > 1 and not member:
        quick_start.loaded()
        return processes.Members(workers, settings.state_path / "run" / "gateway-metrics").run()

    _serve(settings, member=member)
    return 0


def _serve(settings: GatewaySettings, *, member: bool) -> None:
    """Serve in this process. ``member``: True if other gateway processes listen on the same port."""
    # These imports are here, because a process that only starts other gateway processes does not need them.
    from services.gateway import memory, processes
    from services.gateway.app import build
    from tidegate.kernel.service import app as service
    from tidegate.kernel.service import handover

    memory.return_large_blocks()
    gateway = build(settings)
    run = partial(
        service.run,
        gateway.app,
        settings,
        protocol=gateway.protocol,
        on_stop=gateway.drain,
        tls=gateway.tls,
        other_connections=settings.max_grpc_connections,
        busy=gateway.busy,
    )
    listener = handover.inherited("http")
    if listener is None and member:
        listener = processes.listen(settings.host, settings.gateway_port)
    if listener is not None:
        with listener:
            run(0, sock=listener)
    else:
        run(settings.gateway_port)


if __name__ == "__main__":
    sys.exit(main())
