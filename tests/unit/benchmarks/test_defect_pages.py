"""The pages of what reviews found: every row names tests, and they exist."""

from __future__ import annotations

import re

import pytest

from benchmarks import defects, places
from benchmarks.errors import BenchmarkFailed

pytestmark = pytest.mark.unit

HEAD = f"{defects.HEADING}\n\n| | attack | before | now | tests |\n|---|---|---|---|---|\n"


@pytest.mark.parametrize(("page", "numbers"), [("security", range(1, 19)), ("first-contact", range(16))])
def test_every_defect_has_a_test_that_exists(page, numbers):
    found = defects.read(defects.page(page))
    assert {int(re.match(r"\d+", each.number)[0]) for each in found} == set(numbers)  # type: ignore[index]
    for file, name in {test for defect in found for test in defect.tests}:
        text = (places.ROOT / file).read_text()
        assert not name or re.search(rf"^(async )?def {name}\(", text, re.MULTILINE), f"{file}::{name}"


def test_a_row_without_a_test_is_an_error():
    with pytest.raises(BenchmarkFailed, match="No test is named for 1a"):
        defects.read(f"{HEAD}| 1a | attack | before | now | none |\n")
    with pytest.raises(BenchmarkFailed, match="columns"):
        defects.read(f"{HEAD}| 1a | attack | now |\n")


def test_a_test_that_failed_or_did_not_run_fails_the_defect(capsys):
    row = "| 1 | a | b | c | `tests/a.py::test_one`, `tests/b.py` |\n"
    rows = defects.read(HEAD + row)
    good = [
        defects.Ran("tests/a.py", "test_one", "passed", ("7 MB",)),
        defects.Ran("tests/b.py", "x", "passed", ()),
    ]
    assert not defects.show(rows, good)
    assert "2 tests passed; 7 MB" in capsys.readouterr().out
    assert defects.show(rows, good[:1])
    assert defects.show(rows, [good[0], defects.Ran("tests/b.py", "x", "failure", ())])
