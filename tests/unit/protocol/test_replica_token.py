"""Tokens of replicas: what they say, and what they open."""

from __future__ import annotations

import pytest

from tidegate.kernel.protocol import replica_token
from tidegate.kernel.protocol.replica_token import Replicas

pytestmark = pytest.mark.unit

SERVICE_TOKEN = "service-token"


def bearer(token: str) -> bytes:
    return b"Bearer " + token.encode()


def test_a_token_names_its_replica():
    token = replica_token.issue(SERVICE_TOKEN, "digits-v1-0-7")
    assert token.startswith("trt_digits-v1-0-7_")
    assert replica_token.holder(SERVICE_TOKEN, bearer(token)) == "digits-v1-0-7"


@pytest.mark.parametrize(
    "change",
    [
        lambda token: token[:-1] + ("0" if token[-1] != "0" else "1"),
        lambda token: token.replace("digits-v1-0-7", "digits-v1-0-8"),
        lambda token: token.removeprefix("trt_"),
        lambda token: token.rpartition("_")[0] + "_",
        lambda _: "trt_",
        lambda _: "",
        lambda _: "trt_ü_ü",
    ],
)
def test_a_changed_token_is_nobodys(change):
    token = change(replica_token.issue(SERVICE_TOKEN, "digits-v1-0-7"))
    assert replica_token.holder(SERVICE_TOKEN, bearer(token)) is None


def test_another_stacks_token_is_nobodys():
    token = replica_token.issue("another", "digits-v1-0-7")
    assert replica_token.holder(SERVICE_TOKEN, bearer(token)) is None
    assert replica_token.holder("", bearer(replica_token.issue("", "digits-v1-0-7"))) is None


def test_only_a_replica_that_runs_reads_and_only_its_own():
    running = Replicas({"digits-v1-0-7": "a" * 64})
    assert running.may_read("digits-v1-0-7", "a" * 64)
    assert not running.may_read("digits-v1-0-7", "b" * 64)
    assert not running.may_read("digits-v1-0-6", "a" * 64)
    assert not Replicas().may_read("digits-v1-0-7", "a" * 64)
