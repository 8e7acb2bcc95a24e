"""Every page of ``docs/guides``, and ``docs/llm.md``, as a reader types it. `make journeys` runs them all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.conftest import REPO, Stack, running_stack
from tests.integration.kernel import s3
from tests.integration.registry import postgres
from tests.journeys.pages import Page, read
from tests.journeys.reader import reader_of

pytestmark = pytest.mark.e2e

GUIDES = set((REPO / "docs" / "guides").glob("*.md")) - {REPO / "docs" / "guides" / "README.md"}
PAGES = [*sorted(GUIDES), REPO / "docs" / "llm.md"]


@pytest.fixture
def started() -> Iterator[ExitStack]:
    """What a page needs for itself; it ends with the test."""
    with ExitStack() as found:
        yield found


def server_of(page: Page, started: ExitStack, folder: Path) -> dict[str, str]:
    """Start the server that a page needs; return its address by the words of the page."""
    if page.server == "s3":
        found = started.enter_context(s3.rclone(folder / "s3"))
        return {"https://s3.example.com": found["AWS_ENDPOINT_URL"], "my-key": s3.KEY, "my-secret": s3.SECRET}
    if page.server == "postgresql":
        try:
            server = started.enter_context(postgres.running())
        except postgres.NoPostgres as missing:
            pytest.skip(str(missing))
        return {"postgresql+asyncpg://tidegate:PASSWORD@db.example.com/tidegate": server.url("postgres")}
    return {}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_is_true(
    path: Path, environment: Path, started: ExitStack, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    page = read(path)
    texts = server_of(page, started, tmp_path)
    stack: Stack = (
        started.enter_context(running_stack(tmp_path / "state", verification="on"))
        if page.own_stack
        else request.getfixturevalue("stack")
    )
    reader_of(stack, environment, tmp_path, texts).follow(page)
