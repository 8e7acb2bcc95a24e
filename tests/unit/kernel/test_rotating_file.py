"""A log of several processes: rotated by size and age, with no line lost or cut."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

from tidegate.kernel.log_files import rotated
from tidegate.kernel.rotating_file import PARTS, Part, RotatingFile, overdue


def test_the_oldest_part_makes_room_and_the_too_old_go() -> None:
    parts = [Part(number, 1000 - number) for number in range(1, PARTS)]
    assert overdue(parts, 1000, keep_s=100) == [PARTS - 1]
    assert overdue(parts, 1000, keep_s=4.5) == [5, 6, PARTS - 1]
    assert overdue([], 1000, keep_s=1) == []


def test_all_parts_together_stay_below_the_size(tmp_path: Path) -> None:
    file = RotatingFile(tmp_path / "x.log", 8000, keep_s=1e9)
    for number in range(1000):
        file.append(b"%07d %s\n" % (number, b"x" * 91))
    file.close()
    parts = [tmp_path / "x.log", *rotated(tmp_path / "x.log")]
    parts = [part for part in parts if part.exists()]
    kept = [int(line[:7]) for part in reversed(parts) for line in part.read_text().splitlines()]
    assert sum(part.stat().st_size for part in parts) <= 9000
    assert kept == list(range(kept[0], 1000)), "the newest lines, without a gap"
    assert len(kept) > 60


def test_parts_that_are_too_old_go_without_a_rotation(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"x.log.{number}").write_text("old\n")
        os.utime(tmp_path / f"x.log.{number}", (100 * (3 - number), 100 * (3 - number)))
    RotatingFile(tmp_path / "x.log", 8000, keep_s=150, clock=lambda: 300).prune()
    assert [path.name for path in tmp_path.iterdir()] == ["x.log.1"]


def _append(path: Path, writer: int) -> None:
    file = RotatingFile(path, 400_000, keep_s=1e9)
    for number in range(2000):
        file.append(f"{writer} {number:05d} {'x' * 60}\n".encode())


def test_processes_that_rotate_the_same_file_lose_no_line(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=_append, args=(path, writer)) for writer in range(3)]
    for each in writers:
        each.start()
    for each in writers:
        each.join()
    parts = [part for part in (path, *rotated(path)) if part.exists()]
    lines = [line for part in parts for line in part.read_text().splitlines()]
    assert rotated(path), "it was rotated"
    kept = sorted(line[:7] for line in lines)
    assert len(set(kept)) == len(kept)
    assert all(len(line) == 68 for line in lines)
    if len(rotated(path)) < PARTS - 1:  # nothing was deleted
        assert len(kept) == 6000
