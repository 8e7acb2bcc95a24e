"""The pages' reader itself: what it takes for a step, and what it takes for the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.journeys.pages import Command, File, Skipped, matches, read

pytestmark = pytest.mark.unit

PAGE = """
# A page

<!-- file: a/b.txt -->
```
one
```

<!-- not run: it needs a second machine -->
```console
$ reboot
```

<!-- exit: 4 -->
```console
$ first \\
>   --more
shown
$ second
```
"""


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    return path


def test_the_steps_of_a_page(page: Path):
    found = read(page)
    assert found.steps == [
        File("a/b.txt", "one\n"),
        Skipped("it needs a second machine", 10),
        Command("first \\\n  --more", "shown", 16),
        Command("second", "", 19, exit=4),
    ]
    page.write_text("<!-- exit: 4 -->\nText\n")
    with pytest.raises(ValueError, match="is not before a block"):
        read(page)


@pytest.mark.parametrize(
    ("shown", "seen"),
    [
        ("ready after 3.1 s", "ready after 12 s\n"),
        ("a   b\n\nc", " a b\nc"),
        ("first\n...\nlast", "first\nmiddle\nmore\nlast"),
        ("... done", "all is done"),
        ("tg_abc 2026-01-02 03:04:05", "tg_x-y_z0 2027-05-06 07:08:09"),
    ],
)
def test_what_is_the_same(shown: str, seen: str):
    assert matches(shown, seen)


@pytest.mark.parametrize(
    ("shown", "seen"),
    [("version 1", "version 2"), ("a\n...\nc", "a\nb"), ("a", "a\nb"), ("3 rows", "4 rows")],
)
def test_what_is_not_the_same(shown: str, seen: str):
    assert not matches(shown, seen)
