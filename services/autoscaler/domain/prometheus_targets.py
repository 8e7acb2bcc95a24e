"""List workers in the format of Prometheus's HTTP service discovery."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tidegate.kernel.protocol.presence import ReplicaReport


def targets(reports: Iterable[ReplicaReport], *, local: bool) -> list[dict[str, Any]]:
    """Return one target group for each worker. ``local``: True if the workers listen on loopback."""
    return [
        {
            "targets": [f"{'127.0.0.1' if local else report.host}:{report.metrics_port}"],
            "labels": {"deployment": report.deployment, "replica": report.replica},
        }
        for report in sorted(reports, key=lambda each: each.replica)
        if report.metrics_port and report.state != "failed"
    ]
