"""Check a new desired state from the registry, and make an index of it for the decisions of a round."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tidegate.kernel.protocol.models import Deployment, DesiredState, Version


def acceptable(current: DesiredState | None, fresh: DesiredState) -> bool:
    """Return True if ``fresh`` may replace ``current``.

    A desired state without Deployments ends all replicas. If its revision is at least the current revision,
    an operator has deleted the last Deployment, and the state is accepted. If its revision is lower, the
    registry has lost its data, and the state is rejected.
    """
    if current is None or fresh.deployments or not current.deployments:
        return True
    return fresh.revision >= current.revision


@dataclass(frozen=True, slots=True)
class DesiredStateIndex:
    """An index of the desired state, made once a round so that look-ups are fast.

    ``awaited`` are the Deployments that a rollout or a canary waits for: they need a ready replica to get
    traffic. ``kept`` are the baselines of canaries. They keep their replicas, so that a rollback is quick.
    """

    versions: Mapping[tuple[str, int], Version] = field(default_factory=dict)
    awaited: frozenset[str] = frozenset()
    kept: frozenset[str] = frozenset()

    def version_of(self, deployment: Deployment) -> Version | None:
        """Return the Version that a Deployment runs; None if the registry does not list it."""
        return self.versions.get((deployment.model, deployment.version))

    def start_times(self, deployments: Iterable[Deployment]) -> dict[str, float]:
        """Return how many seconds a start took in the verification of each Deployment's version."""
        versions = ((each.name, self.version_of(each)) for each in deployments)
        cards = ((name, version.verification.card) for name, version in versions if version is not None)
        return {name: card.start_s for name, card in cards if card is not None and card.start_s > 0}


def index_of(desired_state: DesiredState | None) -> DesiredStateIndex:
    """Return the index of a desired state; an empty index for None."""
    if desired_state is None:
        return DesiredStateIndex()
    rolling = [endpoint for endpoint in desired_state.endpoints if endpoint.previous]
    canaries = [e.rollout for e in desired_state.endpoints if e.rollout is not None and e.rollout.active]
    return DesiredStateIndex(
        {(version.model, version.number): version for version in desired_state.versions},
        frozenset(t.deployment for endpoint in rolling for t in endpoint.targets if t.weight)
        | frozenset(canary.deployment for canary in canaries),
        frozenset(t.deployment for canary in canaries for t in canary.base if t.weight),
    )
