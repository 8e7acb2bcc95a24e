"""The wheel may be installed on Python 3.10, while the services and these tests run on a later one."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import tidegate
from tidegate.kernel import errors

REPO = Path(__file__).parents[3]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]


def test_client_and_cli_use_nothing_newer_than_the_oldest_python() -> None:
    oldest = PROJECT["requires-python"].removeprefix(">=")
    command = [sys.executable, "-m", "mypy", "--python-version", oldest, "--no-warn-return-any"]
    done = subprocess.run(
        [*command, "tidegate/cli", "tidegate/client"], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"not in Python {oldest}:\n{done.stdout}"


def test_what_the_wheel_needs_is_part_of_the_services_requirements() -> None:
    needed = {line.split(">")[0].strip() for line in PROJECT["dependencies"]}
    listed = {
        line.split()[0] for line in (REPO / "requirements.in").read_text().splitlines() if line[0] != "#"
    }
    assert needed <= {name.split(">")[0] for name in listed}


@pytest.mark.parametrize("name", tidegate.__all__)
def test_everything_exported_is_there(name: str) -> None:
    assert getattr(tidegate, name)
    assert name in dir(tidegate)


def test_every_error_of_the_protocol_is_exported() -> None:
    exported = {getattr(tidegate, name) for name in tidegate.__all__}
    assert exported >= set(errors.BY_REASON.values())
    assert tidegate.TooManyRequests is errors.TooMany


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing_such"):
        tidegate.nothing_such  # noqa: B018
