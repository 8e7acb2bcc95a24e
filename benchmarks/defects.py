"""``python -m benchmarks.defects PAGE``: run the tests of the defects that a review found.

The program reads the table of defects in a page of docs/, runs every test that the table names, and prints
the table with the results. ``--measure`` also runs the programs that measure the defects, which takes some
minutes.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import options, places, session
from benchmarks.errors import BenchmarkFailed

HEADING = "## What a review found"
_TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
MEASURED = {
    "security": ("benchmarks.hostile", "benchmarks.amplification", "benchmarks.killer"),
    "first-contact": ("benchmarks.deaths", "benchmarks.soak"),
}


@dataclass(frozen=True, slots=True)
class Defect:
    """A row of the table. ``tests``: pairs of a file and a test's name (empty: all tests of the file)."""

    number: str
    what: str
    before: str
    now: str
    tests: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Ran:
    """One test that ran: its file, its name without parameters, its outcome, and the figures it reported."""

    file: str
    name: str
    outcome: str
    figures: tuple[str, ...]


def main() -> int:
    """Run the tests, print the table. Return 1 if a test failed, did not run, or is missing."""
    parser = options.parser(__doc__)
    parser.add_argument("page", choices=sorted(MEASURED), help="of docs/")
    parser.add_argument("--measure", action="store_true", help="also measure the defects (some minutes)")
    chosen = parser.parse_args()
    defects = read(page(chosen.page))
    found = run(sorted({test for defect in defects for test in defect.tests}))
    failed = show(defects, found)
    for name in MEASURED[chosen.page] if chosen.measure else ():
        print(f"\n## python -m {name}\n", flush=True)
        failed |= subprocess.run([sys.executable, "-m", name], cwd=places.ROOT, check=False).returncode != 0
    return 1 if failed else 0


def page(name: str) -> str:
    """Return the text of a page of docs/."""
    return (places.ROOT / "docs" / f"{name}.md").read_text()


def read(page: str) -> list[Defect]:
    """Return the rows of the page's table. Raise BenchmarkFailed if a row names no test."""
    _, _, section = page.partition(HEADING)
    rows = [line for line in section.splitlines() if line.startswith("|")]
    defects = []
    for row in rows[2:]:
        cells = [cell.strip() for cell in row.strip().strip("|").split(" | ")]
        if len(cells) != 5:
            raise BenchmarkFailed(f"A row has {len(cells)} columns and not 5: {row[:100]}")
        tests = tuple((file, name or "") for file, name in _TEST.findall(cells[4]))
        if not tests:
            raise BenchmarkFailed(f"No test is named for {cells[0]}")
        defects.append(Defect(cells[0], cells[1], cells[2], cells[3], tests))
    return defects


def run(tests: Sequence[tuple[str, str]]) -> list[Ran]:
    """Run these tests, four files at a time. Raise BenchmarkFailed if pytest itself does not run."""
    ids = [f"{file}::{name}" if name else file for file, name in tests]
    with tempfile.TemporaryDirectory(prefix="tidegate-defects-") as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-n", "4", "--dist", "loadfile"]
        print(f"running {len(ids)} tests and files of tests (some minutes)", flush=True)
        subprocess.run([*command, f"--junitxml={report}", *ids], cwd=places.ROOT, check=False)
        if not report.exists():
            raise BenchmarkFailed("pytest wrote no report: does every test that the page names exist?")
        return list(_ran(ET.parse(report).getroot()))


def _ran(root: ET.Element) -> Iterable[Ran]:
    for case in root.iter("testcase"):
        file = case.get("classname", "").replace(".", "/") + ".py"
        outcome = next(
            (kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None), "passed"
        )
        figures = tuple(each.get("value", "") for each in case.iter("property"))
        yield Ran(file, case.get("name", "").partition("[")[0], outcome, figures)


def show(defects: Sequence[Defect], found: Sequence[Ran]) -> bool:
    """Print the table with the results. Return True if a test of a defect failed or did not run."""
    print("\n| | defect | before | now | seen in this run |")
    print("|---|---|---|---|---|")
    failed = False
    for defect in defects:
        mine = [ran for ran in found if any(_is(ran, test) for test in defect.tests)]
        absent = [test for test in defect.tests if not any(_is(ran, test) for ran in mine)]
        bad = [ran for ran in mine if ran.outcome in ("failure", "error")]
        skipped = sum(ran.outcome == "skipped" for ran in mine)
        failed |= bool(bad or absent)
        seen = f"{len(mine) - len(bad) - skipped} tests passed"
        seen += f", {len(bad)} FAILED: {', '.join(sorted({ran.name for ran in bad}))}" if bad else ""
        seen += f", {skipped} skipped" if skipped else ""
        seen += f", NOT RUN: {', '.join('::'.join(test) for test in absent)}" if absent else ""
        figures = [text for ran in mine for text in ran.figures]
        print(f"| {defect.number} | {defect.what} | {defect.before} | {defect.now} | "
              f"{'; '.join([seen, *figures])} |")  # fmt: skip
    print(f"\n{'FAIL' if failed else 'PASS'}  {len(defects)} defects, {len(found)} tests")
    return failed


def _is(ran: Ran, test: tuple[str, str]) -> bool:
    return ran.file == test[0] and test[1] in ("", ran.name)


if __name__ == "__main__":
    session.run(main)
