"""Test names of replicas, fingerprints, and which desired states are accepted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.autoscaler.domain.desired_state import acceptable
from services.autoscaler.domain.launcher import fingerprint, parse_replica, replica_name
from tidegate.kernel.protocol.models import DesiredState


@given(
    deployment=st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True),
    slot=st.integers(0, 99),
    generation=st.integers(1, 10**6),
)
def test_a_name_reads_back(deployment, slot, generation):
    assert parse_replica(replica_name(deployment, slot, generation)) == (deployment, slot, generation)


@pytest.mark.parametrize("name", ["", "digits", "digits-v1", "digits-v1-0-x", "-0-1", ".new"])
def test_what_is_no_replica(name):
    assert parse_replica(name) is None


@pytest.mark.parametrize(
    ("change", "another_worker"),
    [
        ({"env": {"A": "1"}}, True),
        ({"threads": 2}, True),
        ({"instances": 2}, True),
        ({"batching": {"max_batch": 4}}, True),
        ({"progress_timeout_s": 5}, True),
        ({"max_replicas": 5}, False),
        ({"target_wait_ms": 5}, False),
        ({"max_queue": 5}, False),
    ],
)
def test_only_what_a_worker_reads_at_its_start_asks_for_another(deployment, change, another_worker):
    assert (fingerprint(deployment(**change)) != fingerprint(deployment())) == another_worker


def test_an_emptied_registry_is_believed_only_when_its_history_goes_on(deployment):
    full = DesiredState(revision=7, deployments=[deployment()])
    assert acceptable(None, DesiredState(revision=0))
    assert acceptable(full, DesiredState(revision=8)), "the last Deployment was deleted"
    assert not acceptable(full, DesiredState(revision=0)), "the database was lost"
    assert acceptable(full, DesiredState(revision=2, deployments=[deployment(name="other-v1")]))
    assert acceptable(DesiredState(revision=7), DesiredState(revision=0))
