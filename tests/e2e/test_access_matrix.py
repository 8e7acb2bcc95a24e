"""Every route of every service with every credential, on a stack that lets nobody in unknown."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks import access_matrix
from benchmarks.access_matrix import Keys, credentials, running_replica, tried, undeclared
from tests.e2e.conftest import REPO, Stack, running_stack
from tidegate.kernel.protocol.permissions import CONTROL, SERVICES

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack that asks everybody for a credential, with a model."""
    with running_stack(tmp_path_factory.mktemp("closed") / "state", auth="required") as found:
        folder = REPO / "examples" / "python-model" / "identity"
        found.deploy(folder / "model.py", "identity", "--signature", str(folder / "signature.json"))
        yield found


@pytest.fixture(scope="module")
def urls(closed: Stack) -> dict[str, str]:
    """Where each service answers."""
    found = {name: getattr(closed.settings, f"{name}_url") for name in (*CONTROL, "gateway")}
    return found | {"worker": running_replica(found, closed.settings.service_token)[1]}


async def test_every_route_with_every_credential(closed: Stack, urls: dict[str, str], figure) -> None:
    token = closed.settings.service_token
    replica, _, sha256 = running_replica(urls, token)
    keys = Keys(urls["registry"], urls["gateway"], token)
    try:
        cells = await tried(urls, credentials(keys, token, replica), sha256)
    finally:
        keys.close()
    wrong = [cell for cell in cells if not cell.well]
    assert not wrong, access_matrix.as_markdown(wrong)
    routes = {(cell.call.service, cell.call.line) for cell in cells}
    assert {service for service, _ in routes} == set(SERVICES)
    outcomes = {cell.seen for cell in cells}
    assert outcomes == {"in", "401", "403"}
    figure(f"access matrix: {len(routes)} routes, {len(cells)} calls, all as the table says")


def test_the_running_services_have_no_other_routes(urls: dict[str, str]) -> None:
    assert undeclared(urls) == []


def test_the_metrics_token_is_where_prometheus_is_told_to_look(closed: Stack, urls: dict[str, str]) -> None:
    token = Path(closed.settings.state_path / "metrics" / "token").read_text().strip()
    headers = {"Authorization": f"Bearer {token}"}
    for service in (*CONTROL, "gateway"):
        assert httpx.get(f"{urls[service]}/metrics").status_code == 401
        assert "# TYPE" in httpx.get(f"{urls[service]}/metrics", headers=headers).text
    found = httpx.get(f"{urls['autoscaler']}/prometheus/workers", headers=headers).json()
    assert found
