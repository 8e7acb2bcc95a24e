"""The intention by keys, made once for a round: so a round grows with what there is, not with its square."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tidegate.protocol.models import Deployment, Intention, Version


@dataclass(frozen=True, slots=True)
class Lookup:
    """``awaited`` are the Deployments that a roll-over waits for: traffic moves when each of them has a
    ready replica.
    """

    versions: Mapping[tuple[str, int], Version] = field(default_factory=dict)
    awaited: frozenset[str] = frozenset()

    def version_of(self, deployment: Deployment) -> Version | None:
        """The Version that a Deployment runs; None when the registry did not list it."""
        return self.versions.get((deployment.model, deployment.version))


def lookup(intention: Intention | None) -> Lookup:
    """What is wanted, by keys."""
    if intention is None:
        return Lookup()
    rolling = [endpoint for endpoint in intention.endpoints if endpoint.previous]
    return Lookup(
        {(version.model, version.number): version for version in intention.versions},
        frozenset(t.deployment for endpoint in rolling for t in endpoint.targets if t.weight),
    )
