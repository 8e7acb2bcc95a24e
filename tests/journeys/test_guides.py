"""Every page of ``docs/guides``, as a reader types it. `make journeys` runs them all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.conftest import REPO, Stack, running_stack
from tests.journeys.pages import Page, read
from tests.journeys.reader import reader_of

pytestmark = pytest.mark.e2e

PAGES = sorted(set((REPO / "docs" / "guides").glob("*.md")) - {REPO / "docs" / "guides" / "README.md"})


@pytest.fixture
def stack_of(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[[Page], Stack]]:
    """Give a page the stack that the pages share, or one of its own where it asks for that."""
    with ExitStack() as started:

        def give(page: Page) -> Stack:
            if page.own_stack:
                return started.enter_context(running_stack(tmp_path / "state"))
            shared: Stack = request.getfixturevalue("stack")
            return shared

        yield give


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_is_true(
    path: Path, environment: Path, stack_of: Callable[[Page], Stack], tmp_path: Path
) -> None:
    page = read(path)
    reader_of(stack_of(page), environment, tmp_path).follow(page)
