"""The files and links that are made before a child starts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.conftest import PATIENCE_S
from tidegate.stack.child import Child
from tidegate.stack.launch import spawn


@pytest.mark.parametrize("before", ["nothing", "a link", "a dangling link", "a folder"])
def test_a_link_replaces_what_was_there(tmp_path: Path, before: str):
    place, target = tmp_path / "link", tmp_path / "target"
    target.mkdir()
    (target / "file").touch()
    if before == "a folder":
        place.mkdir()
        (place / "file").touch()
    elif before != "nothing":
        place.symlink_to(target if before == "a link" else tmp_path / "gone")
    child = Child("one", (sys.executable, "-c", ""), {}, None, 1, links={place: target})
    assert spawn(child, tmp_path / "log").wait(PATIENCE_S) == 0
    assert place.readlink() == target
    assert (target / "file").exists()
