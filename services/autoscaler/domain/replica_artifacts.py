"""Which artifact each replica that runs may read: what its token opens at the registry."""

from __future__ import annotations

from collections.abc import Iterable

from services.autoscaler.domain.launcher import Running
from tidegate.kernel.protocol.models import DesiredState


def artifacts_of(running: Iterable[Running], desired_state: DesiredState | None) -> dict[str, str]:
    """Return the sha256 of the artifact of each live replica, by the name that its worker was started with.

    A replica whose Deployment or version is not wanted any more has loaded its model already: it gets none.
    """
    if desired_state is None:
        return {}
    digests = {(version.model, version.number): version.artifact_sha256 for version in desired_state.versions}
    wanted = {each.name: digests.get((each.model, each.version)) for each in desired_state.deployments}
    found = {each.worker or each.replica: wanted.get(each.deployment) for each in running if each.alive}
    return {replica: digest for replica, digest in found.items() if digest is not None}
