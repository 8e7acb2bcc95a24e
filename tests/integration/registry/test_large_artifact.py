"""A large artifact, up and down: killed at half and continued, with bounds on memory. Real processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import artifacts


def test_killed_at_half_and_continued_in_bounded_memory(tmp_path: Path) -> None:
    """The short form of `make bench-artifacts`."""
    with TemporaryDirectory(dir=tmp_path) as name:  # pytest keeps its folders for a while
        found = artifacts.measure(230_000_000, Path(name), f"file://{name}/artifacts")
    assert found.size > 230_000_000
    assert found.problems() == []
    assert found.sent_later > 0
    assert replace(found, registry_mib=201.0, sent_later=found.size).problems() != []
