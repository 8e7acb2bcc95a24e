"""Every page of ``docs/guides``, as a reader types it. `make journeys` runs them all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import REPO, Stack
from tests.journeys.pages import read
from tests.journeys.reader import reader_of

pytestmark = pytest.mark.e2e

PAGES = sorted(set((REPO / "docs" / "guides").glob("*.md")) - {REPO / "docs" / "guides" / "README.md"})


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_is_true(path: Path, environment: Path, stack: Stack, tmp_path: Path) -> None:
    reader_of(stack, environment, tmp_path).follow(read(path))
