"""The page of what a review found: every row names tests, and they exist."""

from __future__ import annotations

import re

import pytest

from benchmarks import places, security
from benchmarks.errors import BenchmarkFailed

pytestmark = pytest.mark.unit

HEAD = f"{security.HEADING}\n\n| | attack | before | now | tests |\n|---|---|---|---|---|\n"


def test_every_defect_has_a_test_that_exists():
    defects = security.read(security.PAGE.read_text())
    assert {int(re.match(r"\d+", each.number)[0]) for each in defects} == set(range(1, 19))  # type: ignore[index]
    for file, name in {test for defect in defects for test in defect.tests}:
        text = (places.ROOT / file).read_text()
        assert not name or re.search(rf"^(async )?def {name}\(", text, re.MULTILINE), f"{file}::{name}"


def test_a_row_without_a_test_is_an_error():
    with pytest.raises(BenchmarkFailed, match="no test is named for 1a"):
        security.read(f"{HEAD}| 1a | attack | before | now | none |\n")
    with pytest.raises(BenchmarkFailed, match="columns"):
        security.read(f"{HEAD}| 1a | attack | now |\n")


def test_a_test_that_failed_or_did_not_run_fails_the_defect(capsys):
    row = "| 1 | a | b | c | `tests/a.py::test_one`, `tests/b.py` |\n"
    defects = security.read(HEAD + row)
    good = [
        security.Ran("tests/a.py", "test_one", "passed", ("7 MB",)),
        security.Ran("tests/b.py", "x", "passed", ()),
    ]
    assert not security.show(defects, good)
    assert "2 tests passed; 7 MB" in capsys.readouterr().out
    assert security.show(defects, good[:1])
    assert security.show(defects, [good[0], security.Ran("tests/b.py", "x", "failure", ())])
