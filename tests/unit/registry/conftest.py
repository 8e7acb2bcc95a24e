"""Snapshots for decisions, without a database."""

from __future__ import annotations

from typing import Any

import pytest

from services.registry.domain import edits, rollover
from services.registry.domain.desired_state import Change, RegistrySnapshot


class Book:
    """A snapshot that applies decisions, like the database."""

    def __init__(self, **versions: int) -> None:
        keys = {(model, number) for model, last in versions.items() for number in range(1, last + 1)}
        self.now = RegistrySnapshot(frozenset(keys), {}, {})

    def carry_out(self, changes: list[Change]) -> list[Change]:
        self.now = self.now.after(changes)
        return changes

    def deploy(self, model: str = "digits", version: int | None = None, **options: Any) -> list[Change]:
        endpoint = options.pop("endpoint", None)
        plan = rollover.deploy(self.now, rollover.DeployRequest(model, version, options, endpoint))
        return self.carry_out(plan.changes)

    def settle(self, endpoint: str = "digits") -> list[Change]:
        return self.carry_out(rollover.settle(self.now, endpoint, None))

    def put_deployment(self, name: str, **fields: Any) -> list[Change]:
        return self.carry_out(edits.put_deployment(self.now, name, fields))

    def put_endpoint(self, name: str, **fields: Any) -> list[Change]:
        return self.carry_out(edits.put_endpoint(self.now, name, fields))

    def targets(self, endpoint: str = "digits") -> tuple[list[str], list[str]]:
        spec = self.now.endpoint(endpoint).spec
        return [t.deployment for t in spec.targets], [t.deployment for t in spec.previous]

    def scale(self, deployment: str) -> tuple[int, int, float | None]:
        spec = self.now.deployment(deployment).spec
        return spec.min_replicas, spec.max_replicas, spec.scale_to_zero_after_s


@pytest.fixture
def book() -> Book:
    """A model `digits` with three versions, and a model `mnist` with one."""
    return Book(digits=3, mnist=1)
