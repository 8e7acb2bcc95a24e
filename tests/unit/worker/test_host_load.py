"""The load of the host's cores, from the kernel's counters."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.worker.adapters.host_load import HostLoad

pytestmark = pytest.mark.unit


def test_the_share_between_two_readings(tmp_path: Path):
    stat, now = tmp_path / "stat", [0.0]
    load = HostLoad(stat, lambda: now[0])

    def read(after_s: float, busy: int, idle: int) -> float | None:
        now[0] += after_s
        stat.write_text(f"cpu  {busy} 0 0 {idle} 0 0 0 0 99 99\ncpu0 1 2 3\n")
        return load.read()

    assert read(0.0, 100, 100) is None
    assert read(1.0, 175, 125) == 0.75
    assert read(0.1, 9999, 125) == 0.75, "too short an interval keeps the last share"
    assert read(1.0, 175, 225) == 0.0


def test_without_the_file_nothing_is_known(tmp_path: Path):
    load = HostLoad(tmp_path / "absent")
    assert (load.read(), load.read()) == (None, None)


def test_this_host():
    assert HostLoad().read() is None, "one reading is no share"
