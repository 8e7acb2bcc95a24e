"""Find out why a Deployment has no ready replica, from its status and its replicas' reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tidegate.kernel.protocol.presence import ReplicaReport

LOAD_FAILED = "LoadFailed"


class ReplicaFault(NamedTuple):
    """The fields of a ``ReplicaFleet`` that say what is wrong; as given: nothing is."""

    fault: str = ""
    load_failed: bool = False
    reloading: str = ""


def trouble(reports: Sequence[ReplicaReport], status: Mapping[str, Any]) -> ReplicaFault:
    """Return what keeps a Deployment from answering. ``reports``: of its replicas, none of which is ready."""
    again = [r.message or "it loads its model again" for r in reports if r.state == "starting" and r.ready_at]
    loaded = next((c for c in status.get("conditions", ()) if c["type"] == "Loaded" and not c["ok"]), None)
    if loaded is None:
        return ReplicaFault(reloading=again[0] if again else "")
    # The status goes on when the store has lost the reports of replicas that serve.
    left = status.get("ready") or status.get("draining") or any(r.state == "draining" for r in reports)
    own = loaded.get("reason") == LOAD_FAILED
    return ReplicaFault(loaded["message"], own and not left and not again, again[0] if again else "")
