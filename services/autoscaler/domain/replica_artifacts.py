"""Find the artifact that each running replica may read at the registry with its token."""

from __future__ import annotations

from collections.abc import Iterable

from services.autoscaler.domain.launcher import Running
from tidegate.kernel.protocol.models import DesiredState


def artifacts_of(running: Iterable[Running], desired_state: DesiredState | None) -> dict[str, str]:
    """Return the sha256 of each live replica's artifact, by the name that its worker was started with.

    Replicas of deleted Deployments or versions are left out. They have already loaded their models, so they
    need no artifact any more.
    """
    if desired_state is None:
        return {}
    digests = {(version.model, version.number): version.artifact_sha256 for version in desired_state.versions}
    of_deployment = {each.name: digests.get((each.model, each.version)) for each in desired_state.deployments}
    found = {
        each.worker or each.replica: of_deployment.get(each.deployment) for each in running if each.alive
    }
    return {replica: digest for replica, digest in found.items() if digest is not None}
