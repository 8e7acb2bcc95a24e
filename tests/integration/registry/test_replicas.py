"""A replica's token opens its own artifact while the replica runs, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integration.registry.conftest import TOKEN, Caller
from tidegate.kernel.protocol import access, replica_token

pytestmark = pytest.mark.integration

REPLICA = "digits-v1-0-1"


def as_replica(replica: str = REPLICA) -> dict[str, Any]:
    return {"headers": {"Authorization": f"Bearer {replica_token.issue(TOKEN, replica)}"}}


async def running(call: Caller, **artifacts: str) -> None:
    await call("PUT", "/v1/replicas", {"artifacts": {k.replace("_", "-"): v for k, v in artifacts.items()}})


async def test_a_replica_reads_its_own_artifact_while_it_runs(call: Caller) -> None:
    mine, other = await call.upload(b"mine"), await call.upload(b"another")
    await call("GET", f"/v1/artifacts/{mine}", status=403, **as_replica())

    await running(call, digits_v1_0_1=mine)
    answer = await call.http.get(f"/v1/artifacts/{mine}", **as_replica())
    assert (answer.status_code, answer.content) == (200, b"mine")
    await call("GET", f"/v1/artifacts/{other}", status=403, **as_replica())
    await call("GET", f"/v1/artifacts/{mine}", status=403, **as_replica("digits-v1-0-2"))

    await running(call)
    await call("GET", f"/v1/artifacts/{mine}", status=403, **as_replica())


async def test_a_replica_may_use_no_other_route(call: Caller) -> None:
    mine = await call.upload(b"mine")
    await running(call, digits_v1_0_1=mine)
    for method, path, body in [
        ("PUT", "/v1/artifacts", None),
        ("GET", "/v1/intention", None),
        ("GET", "/v1/desired-state", None),
        ("GET", "/v1/models", None),
        ("GET", "/v1/keys/table", None),
        ("POST", "/v1/keys", {"name": "n", "scopes": ["admin"]}),
        ("GET", "/v1/audit", None),
        ("PUT", "/v1/deployments/d", {"model": "m", "version": 1}),
        ("PUT", "/v1/replicas", {"artifacts": {REPLICA: mine}}),
    ]:
        await call(method, path, body, status=403, **as_replica())


async def test_a_forged_token_is_refused(call: Caller) -> None:
    mine = await call.upload(b"mine")
    await running(call, digits_v1_0_1=mine)
    forged = replica_token.issue("guessed", REPLICA)
    await call("GET", f"/v1/artifacts/{mine}", status=401, headers={"Authorization": f"Bearer {forged}"})


async def test_only_the_autoscaler_reports_running_replicas(call: Caller) -> None:
    publisher = access.Principal("k", "k", frozenset({access.ADMIN})).to_header()
    await call(
        "PUT",
        "/v1/replicas",
        {"artifacts": {}},
        status=403,
        headers={access.PRINCIPAL_HEADER.decode(): publisher},
    )
    await call("PUT", "/v1/replicas", {"artifacts": {REPLICA: "no digest"}}, status=400)
