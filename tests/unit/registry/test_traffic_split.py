"""Splitting an endpoint's traffic."""

from __future__ import annotations

from typing import Any

import pytest

from services.registry.domain import rollover
from services.registry.domain.traffic_split import split
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.models import Target


def share(book: Any, **weights: int) -> list[Any]:
    targets = [Target(deployment=name.replace("_", "-"), weight=weight) for name, weight in weights.items()]
    return book.carry_out(split(book.now, "digits", targets))


def test_a_sleeping_version_is_woken_before_it_gets_traffic(book):
    book.deploy(version=1)
    book.deploy(version=2, min_replicas=2)
    book.settle()
    assert book.scale("digits-v1")[0] == 0
    share(book, digits_v2=90, digits_v1=10)
    assert book.targets() == (["digits-v2", "digits-v1"], ["digits-v2"]), "until the other one is ready"
    assert book.scale("digits-v1") == (2, 2, None)
    book.settle()
    assert book.targets() == (["digits-v2", "digits-v1"], [])


def test_new_weights_of_serving_targets_apply_at_once(book):
    book.deploy(version=1)
    book.deploy(version=2)
    share(book, digits_v2=90, digits_v1=10)
    book.settle()
    share(book, digits_v2=50, digits_v1=50)
    assert book.targets()[1] == []
    share(book, digits_v1=100)
    assert book.targets() == (["digits-v1"], [])
    assert book.scale("digits-v2")[0] == 0, "it gets nothing any more"


def test_a_declared_deployment_keeps_its_scale(book):
    book.deploy(version=1, min_replicas=3)
    book.put_deployment("canary", model="digits", version=2)
    share(book, digits_v1=90, canary=10)
    assert book.scale("canary") == (1, 1, None)


def test_without_traffic_only_the_deployment_is_made(book):
    book.deploy(version=1, threads=3)
    plan = rollover.deploy(book.now, rollover.DeployRequest("digits", 2, traffic=False))
    book.carry_out(plan.changes)
    assert book.now.deployment("digits-v2").spec.threads == 3
    assert book.targets() == (["digits-v1"], [])
    share(book, digits_v1=90, digits_v2=10)
    assert book.targets() == (["digits-v1", "digits-v2"], ["digits-v1"])


def test_unknown_names_are_refused(book):
    book.deploy(version=1)
    with pytest.raises(BadRequest, match="'digits-v9', which does not exist"):
        share(book, digits_v9=1)
