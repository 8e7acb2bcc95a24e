"""The scopes of the routes of canaries."""

from __future__ import annotations

import pytest

from tidegate.kernel.protocol import permissions
from tidegate.kernel.protocol.access import PUBLISH

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("part", "scope"),
    [("promote", PUBLISH), ("pause", PUBLISH), ("progress", permissions.INTERNAL)],
)
def test_only_the_router_decides_about_a_canary(part, scope):
    """Its decisions promote a canary, for which a caller needs the scope publish."""
    route = permissions.REGISTRY.find("POST", f"/v1/endpoints/digits/rollout/{part}")
    assert route is not None
    assert route.scopes == (scope,)
