"""``up --profile``: it lasts, and does not change a running stack."""

from __future__ import annotations

from pathlib import Path

import pytest

from tidegate.cli.edge_profile import VARIABLE, chosen, running
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.own_stack import StackFailed
from tidegate.kernel.settings import file
from tidegate.kernel.settings.base import Settings
from tidegate.stack.processes import Process
from tidegate.stack.record import ChildRecord, StackRecord

pytestmark = pytest.mark.unit

DOWN = StackRecord()
EDGE = StackRecord("running", Process(1, 1), (ChildRecord("control"), ChildRecord("gateway")))
PLAIN = StackRecord("running", Process(1, 1), (ChildRecord("registry"), ChildRecord("gateway")))


def test_a_profile_lasts_until_another_one_is_chosen(tmp_path: Path):
    assert chosen(Settings(state_dir=tmp_path), "edge", DOWN).profile == "edge"
    assert file.read(tmp_path) == {VARIABLE: "edge"}
    assert Settings(state_dir=tmp_path).profile == "edge"
    assert chosen(Settings(state_dir=tmp_path), "default", DOWN).profile == "default"
    assert file.read(tmp_path) == {}


def test_a_running_stack_keeps_its_profile(tmp_path: Path):
    assert (running(EDGE), running(PLAIN)) == ("edge", "default")
    chosen(Settings(state_dir=tmp_path), "edge", EDGE)
    with pytest.raises(StackFailed, match="tidegate down"):
        chosen(Settings(state_dir=tmp_path), "edge", PLAIN)
    assert file.read(tmp_path) == {}


def test_an_unknown_profile_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="default, edge"):
        chosen(Settings(state_dir=tmp_path), "tiny", DOWN)
