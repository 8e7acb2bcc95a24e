"""The source of each line of output, and how much output is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.worker.adapters.model_log import ModelLog
from services.worker.domain.model_output import BURST_S, LINE_BYTES, LONGEST_LINE, OutputLimit, OutputReader
from tests.conftest import PATIENCE_S

HEAD = "{}1129 09:46:28.417910 4366 {}] "


def said(text: str) -> list[tuple[str, str, str, bool]]:
    return [(x.source, x.level, x.text, x.logged) for x in OutputReader().feed(text.encode())]


def test_lines_that_come_in_pieces_are_put_together() -> None:
    reader = OutputReader()
    assert reader.feed(b"ha") == []
    assert [line.text for line in reader.feed(b"lf\nwhole\nre")] == ["half", "whole"]
    assert [line.text for line in reader.end()] == ["re"]


def test_the_model_s_lines_are_told_and_the_usual_ones_of_triton_are_not() -> None:
    text = (
        HEAD.format("I", "server.cc:674") + "\n+---+\n| Backend |\n+---+\n\n"
        "the model's own\n"
        + HEAD.format("I", "grpc_server.cc:2558")
        + '"Started"\n'
        + HEAD.format("E", "model_lifecycle.cc:654")
        + "failed to load\n"
        + HEAD.format("W", "model.py:11")
        + '"by pb_utils"\n'
        + HEAD.format("E", "pinned_memory_manager.cc:1")
        + "CudaDriverHelper has not been initialized.\n"
    )
    logged = [line[:3] for line in said(text) if line[3]]
    assert logged == [
        ("model", "info", "the model's own"),
        ("triton", "error", "failed to load"),
        ("model", "warning", "by pb_utils"),
    ]


def test_a_table_of_the_model_is_told() -> None:
    assert [line[3] for line in said("| a |\n+---+\n")] == [True, True]


def test_a_line_that_does_not_end_is_cut_once() -> None:
    reader = OutputReader()
    found = [line for _ in range(100) for line in reader.feed(b"x" * 1000)]
    assert len(found) == 1
    assert len(found[0].text) < LONGEST_LINE + 100
    assert [line.text for line in reader.feed(b"yy\nnext\n")] == ["next"]


def test_output_above_the_pace_is_dropped_and_counted() -> None:
    pace = OutputLimit(1000)
    kept = sum(pace.take(100, now=1.0) for _ in range(1000))
    assert kept == 160, "a burst of 16 seconds"
    assert pace.take(100, now=1.1)
    assert not pace.take(100, now=1.1)
    dropped = pace.settled()
    assert dropped is not None
    assert (dropped.lines, dropped.bytes) == (841, 84_100)
    assert pace.settled() is None


def test_a_flood_is_passed_over_unless_triton_speaks() -> None:
    reader = OutputReader()
    reader.feed(b"beg")
    assert reader.skip(b"un\nb\nc\nd") == 3
    assert [line.text for line in reader.feed(b"e\n")] == ["de"]
    assert reader.skip(b"no end") is None
    assert reader.skip(b"a\n" + HEAD.format("E", "x.cc:1").encode() + b"bad\n") is None


def test_a_pace_is_exhausted_when_less_than_half_would_be_kept() -> None:
    pace = OutputLimit(1000)
    assert not pace.exhausted(32_000, now=0.0)
    assert pace.take(16_000, now=0.0)
    assert pace.exhausted(1000, now=0.4)
    assert not pace.exhausted(1000, now=0.5)
    pace.drop(3, 300)
    assert pace.settled() is not None


@pytest.mark.parametrize("each", [b"\n", b"a\n", b"line\n"])
def test_short_lines_cost_what_they_take_on_disk(tmp_path: Path, each: bytes) -> None:
    log, reader = ModelLog(tmp_path / "triton.log", 1000), OutputReader()
    with log.path.open("ab", buffering=0) as raw:
        for _ in range(10):
            log.keep(reader.feed(each * 1000), raw)
    assert 0 < log.path.read_bytes().count(b"\n") <= 1000 * (BURST_S + PATIENCE_S) / LINE_BYTES
