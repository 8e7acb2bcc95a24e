"""Hostile files are refused with words that say what is wrong, in bounded memory, and leave nothing."""

from __future__ import annotations

from pathlib import Path

from benchmarks import hostile_files
from benchmarks.hostile_corpus import CASES
from tests.conftest import Figure


def test_every_hostile_file_is_refused_and_leaves_nothing(tmp_path: Path, figure: Figure) -> None:
    """The short form of `python -m benchmarks.hostile_files`, against a registry as a process."""
    assert len({case.name for case in CASES}) == len(CASES)
    outcome = hostile_files.measure(tmp_path, short=True)
    assert len(outcome.answers) >= 70
    assert outcome.problems() == []
    figure(
        f"{len(outcome.answers)} hostile files refused; memory {outcome.began_mib:.0f} MiB before, at most "
        f"{outcome.peak_mib:.0f} MiB"
    )


def test_a_wrong_answer_is_noticed() -> None:
    right = hostile_files.Answer("a", 1, 400, "m", 0.1, "")
    outcome = hostile_files.Outcome([right], began_mib=100, peak_mib=200)
    assert outcome.problems() == []
    outcome.answers.append(hostile_files.Answer("b", 1, 500, "m", 0.1, "the status is 500"))
    outcome.left.append("a file")
    outcome.peak_mib = 501
    assert len(outcome.problems()) == 3
