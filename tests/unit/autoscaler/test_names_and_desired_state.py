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


FAR = {"credential": "env:FAR_API_KEY"}
LLM = {"engine": "openai-url", "upstream": "https://far/v1", **FAR}
OIP = {"address": "https://far/v2/models/m", **FAR}


@pytest.mark.parametrize(
    ("fields", "digest"),
    [
        ({}, "15762b9cf666c7df"),
        ({"llm": {"engine": "llamacpp", "slots": 2}}, "bc4af3ef2042c502"),
        ({"llm": LLM}, "02fafb70698a8827"),
        ({"upstream": OIP}, "549839f1cf24d9d4"),
    ],
)
def test_an_upgrade_of_tidegate_replaces_no_worker(deployment, fields, digest):
    """A new digest would replace the workers of every such Deployment."""
    assert fingerprint(deployment(**fields)) == digest


@pytest.mark.parametrize(("field", "spec"), [("llm", LLM), ("upstream", OIP)])
def test_the_header_of_a_credential_asks_for_another_worker(deployment, field, spec):
    other = {**spec, "credential_header": "api-key"}
    assert fingerprint(deployment(**{field: other})) != fingerprint(deployment(**{field: spec}))


def test_an_emptied_registry_is_believed_only_when_its_history_goes_on(deployment):
    full = DesiredState(revision=7, deployments=[deployment()])
    assert acceptable(None, DesiredState(revision=0))
    assert acceptable(full, DesiredState(revision=8)), "the last Deployment was deleted"
    assert not acceptable(full, DesiredState(revision=0)), "the database was lost"
    assert acceptable(full, DesiredState(revision=2, deployments=[deployment(name="other-v1")]))
    assert acceptable(DesiredState(revision=7), DesiredState(revision=0))
