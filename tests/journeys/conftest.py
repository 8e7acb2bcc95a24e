"""A wheel in an empty environment, and a reader with a home and a folder of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.conftest import Stack, running_stack
from tests.e2e.test_wheel import environment, wheel

__all__ = ["environment", "wheel"]


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The stack that most pages share. It verifies versions, as the stacks of readers do."""
    with running_stack(tmp_path_factory.mktemp("stack") / "state", verification="on") as found:
        yield found
