"""The choice of the Python from which the environments are made."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from deploy.bootstrap import python_check, system
from deploy.bootstrap.environments import usable
from deploy.bootstrap.python_check import GOOD, UNFIT, USABLE

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("prefix", "arguments", "fast"),
    [
        ("/usr", "'--enable-shared'", True),
        ("/usr/local", "'--enable-shared' '--enable-optimizations' '--with-lto'", True),
        ("/root/.pyenv/versions/3.11.7", "'--prefix=/root/.pyenv/versions/3.11.7'", False),
        ("/opt/python", None, False),
    ],
)
def test_a_python_is_optimized_by_its_prefix_or_its_build_arguments(
    monkeypatch: pytest.MonkeyPatch, prefix: str, arguments: str | None, fast: bool
):
    monkeypatch.setattr(sys, "base_prefix", prefix)
    monkeypatch.setitem(sysconfig.get_config_vars(), "CONFIG_ARGS", arguments)
    assert python_check.optimized() is fast


def test_a_slow_or_incomplete_python_can_be_used_and_a_wrong_version_cannot(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    monkeypatch.setattr(system, "python_lacks", list)
    assert python_check.suitability() == GOOD
    monkeypatch.setattr(system, "python_lacks", lambda: ["python3.11-venv"])
    assert python_check.suitability() == USABLE
    monkeypatch.setattr(system, "python_lacks", list)
    monkeypatch.setattr(python_check, "optimized", lambda: False)
    assert python_check.suitability() == USABLE
    monkeypatch.setattr(python_check, "SUPPORTED", ((3, 99),))
    assert python_check.suitability() == UNFIT


@pytest.mark.parametrize(
    ("found", "chosen"),
    [
        ({"python3": GOOD, "python3.12": GOOD}, "python3"),
        ({"python3": USABLE, "python3.12": GOOD, "python3.11": GOOD}, "python3.12"),
        ({"python3": UNFIT, "python3.12": USABLE, "python3.11": USABLE}, "python3.12"),
        ({"python3": 1, "python3.12": USABLE}, "python3.12"),
        ({"python3": GOOD, "environment": GOOD}, "environment"),
        ({"python3": GOOD, "environment": USABLE}, "environment"),
        ({"python3": GOOD, "environment": UNFIT}, "python3"),
        ({"python3": GOOD, "environment": 1}, "python3"),
        ({"python3": GOOD, "environment": 127}, "python3"),
        ({"python3": UNFIT}, "python3"),
    ],
)
def test_an_environments_python_comes_before_the_first_good_one(
    tmp_path: Path, found: dict[str, int], chosen: str
):
    assert _found(tmp_path, found) == chosen


def test_the_python_named_by_the_user_is_used(tmp_path: Path):
    named = str(tmp_path / "python3.11")
    assert (
        _found(tmp_path, {"python3": GOOD, "environment": GOOD, "python3.11": UNFIT}, TIDEGATE_PYTHON=named)
        == named
    )


def _found(folder: Path, pythons: dict[str, int], **variables: str) -> str:
    """Return the Python that `make` chooses among these, each given with its exit status."""
    for name, status in pythons.items():
        (folder / name).write_text(
            f'#!/bin/sh\n[ "$*" = "-m deploy.bootstrap.python_check" ] && exit {status}\n'
        )
        (folder / name).chmod(0o755)
    for tool in ("sh", "make"):
        (folder / tool).symlink_to(str(shutil.which(tool)))
    # Hide the Pythons of this machine.
    text = (ROOT / "Makefile").read_text().replace("/usr/bin/python3", "/nowhere/python3")
    (folder / "Makefile").write_text(text + '\nfind:\n\t@$(FIND_PYTHON); echo "$$p"\n')
    command = [str(folder / "make"), "--no-print-directory", "find", f"PY={folder / 'environment'}"]
    environment = {"PATH": str(folder), **variables}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip().removeprefix(f"{folder}/") if not variables else done.stdout.strip()


def test_an_environment_of_another_python_is_not_usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(os.path.realpath(sys.executable))
    assert usable(tmp_path, "sys")
    monkeypatch.setattr(sys, "base_prefix", "/another")
    assert not usable(tmp_path, "sys")
