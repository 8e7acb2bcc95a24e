"""The run with kills leaves no part of the stack out."""

from __future__ import annotations

import pytest

from benchmarks.chaos import kills
from tidegate.kernel.settings.base import Settings
from tidegate.stack.plan import plan

pytestmark = pytest.mark.unit


def test_every_part_is_killed(tmp_path):
    """epmd only introduces Erlang nodes to each other, and migrate ends before the registry starts."""
    stack = {child.name for child in plan(Settings(state_dir=tmp_path, monitoring="off"), {})}
    assert set(kills.PARTS) == (stack - {"epmd", "migrate"}) | {"worker", "triton"}
