"""What is wanted: which reading of the registry may replace the last good one, and how one is looked into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tidegate.kernel.protocol.models import Deployment, DesiredState, Version


def acceptable(current: DesiredState | None, fresh: DesiredState) -> bool:
    """Whether ``fresh`` may replace ``current``.

    A reading without any Deployment stops everything that runs. It is believed when it continues the
    history (the last Deployment was deleted), not when the history starts again: then the registry
    has lost its data, and what runs goes on.
    """
    if current is None or fresh.deployments or not current.deployments:
        return True
    return fresh.revision >= current.revision


@dataclass(frozen=True, slots=True)
class DesiredStateIndex:
    """The intention by keys, made once for a round: so a round grows with what there is, not with its square.

    ``awaited`` are the Deployments that a roll-over waits for: traffic moves when each of them has a
    ready replica.
    """

    versions: Mapping[tuple[str, int], Version] = field(default_factory=dict)
    awaited: frozenset[str] = frozenset()

    def version_of(self, deployment: Deployment) -> Version | None:
        """The Version that a Deployment runs; None when the registry did not list it."""
        return self.versions.get((deployment.model, deployment.version))


def index_of(desired_state: DesiredState | None) -> DesiredStateIndex:
    """What is wanted, by keys."""
    if desired_state is None:
        return DesiredStateIndex()
    rolling = [endpoint for endpoint in desired_state.endpoints if endpoint.previous]
    return DesiredStateIndex(
        {(version.model, version.number): version for version in desired_state.versions},
        frozenset(t.deployment for endpoint in rolling for t in endpoint.targets if t.weight),
    )
