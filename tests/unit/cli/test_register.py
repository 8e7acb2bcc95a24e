"""What `tidegate deploy` sends if a version with the same bytes exists."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tidegate.cli.deploy_request import DeployRequest
from tidegate.cli.publish import register

HELD: dict[str, Any] = {
    "metadata": {"parent": "digits@4", "trained_at": "2026-11-30T10:00:00Z", "tags": ["a"]},
    "number": 5,
}


@pytest.mark.parametrize(
    ("metadata", "changes"),
    [
        ({}, False),
        ({"parent": "digits@champion"}, False),
        ({"parent": "digits@3"}, True),
        ({"parent": "letters@champion"}, True),
        ({"parent": "a drawing"}, True),
        ({"trained_at": "2026-11-30T12:00:00+02:00"}, False),
        ({"trained_at": "2026-11-30T12:00:00Z"}, True),
        ({"tags": ["a"], "parent": "digits@champion"}, False),
        ({"tags": ["b"]}, True),
    ],
)
def test_only_new_metadata_is_sent(metadata: dict[str, Any], changes: bool) -> None:
    sent: list[dict[str, Any]] = []

    def patch(path: str, body: dict[str, Any]) -> dict[str, Any]:
        sent.append(body)
        return HELD

    registry = SimpleNamespace(post=lambda *_: HELD, patch=patch)
    package: Any = SimpleNamespace(sha256="0" * 64, filename="m.onnx", format="onnx")
    control: Any = SimpleNamespace(registry=registry)
    register(control, package, DeployRequest(Path("m.onnx"), "digits", metadata=metadata))
    assert sent == ([{"metadata": {**HELD["metadata"], **metadata}}] if changes else [])
