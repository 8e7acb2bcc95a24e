"""The systemd unit: its text, its check by systemd, and the notification that the stack is ready."""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from tidegate.stack import systemd_notify
from tidegate.stack.unit import Unit, check_name, text_of

SYSTEM = Unit(Path("/srv/tide"), Path("/opt/venv/bin/python"), Path("/srv"), "tide", "tide")
QUOTES = {"TIDEGATE_X": 'a "b" $c\\'}
STRANGE = Unit(Path("/srv/my tide/100%"), Path("/opt/a b/python"), Path("/srv/my tide"), environment=QUOTES)


def values(text: str, key: str) -> list[str]:
    return [line.partition("=")[2] for line in text.splitlines() if line.startswith(f"{key}=")]


def test_a_system_wide_unit():
    text = text_of(SYSTEM)
    assert values(text, "Type") == ["notify"]
    assert values(text, "User") == ["tide"]
    assert values(text, "ExecStart") == ["/opt/venv/bin/python -P -m tidegate.cli service run"]
    assert values(text, "ExecStop") == ["/opt/venv/bin/python -P -m tidegate.cli down"]
    assert values(text, "Environment") == ["TIDEGATE_STATE_DIR=/srv/tide"]
    assert values(text, "After") == ["network-online.target nvidia-persistenced.service"]
    assert values(text, "OOMPolicy") == ["continue"]
    assert values(text, "WantedBy") == ["multi-user.target"]
    for forbidden in ("RestrictNamespaces", "ProtectProc", "ProtectKernelTunables", "SystemCallFilter"):
        assert not values(text, forbidden), "the models' sandbox needs it"


def test_a_unit_of_a_user():
    text = text_of(STRANGE)
    assert values(text, "User") == []
    assert values(text, "ProtectSystem") == [], "it needs mounts"
    assert values(text, "WantedBy") == ["default.target"]
    assert values(text, "ExecStart") == ['"/opt/a b/python" -P -m tidegate.cli service run']
    assert values(text, "RequiresMountsFor") == ['"/srv/my tide/100%%"']
    assert values(text, "Environment")[1] == '"TIDEGATE_X=a \\"b\\" $c\\\\"'


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("unit", [SYSTEM, STRANGE], ids=["system", "user"])
def test_systemd_accepts_the_unit(unit: Unit, tmp_path: Path):
    python = tmp_path / "a b" / "python"
    python.parent.mkdir()
    python.touch(mode=0o755)
    # systemd checks that the program exists.
    user, group = ("root", "root") if unit.system else ("", "")
    place = tmp_path / "tide.service"
    place.write_text(text_of(Unit(tmp_path, python, tmp_path, user, group, unit.environment)))
    command = ["systemd-analyze", "verify", "--man=no", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    ours = [line for line in done.stderr.splitlines() if "tide.service" in line]
    assert (done.returncode, ours) == (0, []), done.stderr


@pytest.mark.parametrize("name", ["", "a/b", "-x", "a b", "../a"])
def test_invalid_names_of_units_are_rejected(name: str):
    with pytest.raises(ValueError, match="cannot be the name of a unit"):
        check_name(name)
    assert check_name("tide-2.service") == "tide-2"


@pytest.mark.parametrize("abstract", [False, True])
def test_notifying_systemd(tmp_path: Path, abstract: bool):
    name = f"@tidegate-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name[1:] if abstract else name)
        systemd_notify.to(name)("READY=1\nSTATUS=running")
        assert manager.recv(1000) == b"READY=1\nSTATUS=running"
    systemd_notify.to(name)("nobody listens, which is no error")
    systemd_notify.to("")("nobody was named")


@pytest.mark.parametrize("path", ["/a\nExecStartPre=/bin/evil", "/a\rExecStartPre=/bin/evil", "/a\\", "/a "])
def test_a_path_cannot_add_a_line(path: str) -> None:
    for unit in (
        dataclasses.replace(SYSTEM, state=Path(path)),
        dataclasses.replace(SYSTEM, folder=Path(path)),
    ):
        with pytest.raises(ValueError, match="Move it to a folder with a plain name"):
            text_of(unit)


@pytest.mark.parametrize("ending", ["\n", "\r", "\x0b", "\x00"])
def test_a_setting_cannot_add_a_line(ending: str) -> None:
    unit = dataclasses.replace(SYSTEM, environment={"TIDEGATE_X": f"x{ending}ExecStartPre=/bin/evil"})
    text = text_of(unit)
    assert ending == "\n" or ending not in text
    assert not values(text.replace("\r", "\n"), "ExecStartPre")
