"""`tidegate service` against a systemctl that notes how it is called."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tidegate.cli import service


def test_secrets_are_not_written():
    environ = {
        "TIDEGATE_GATEWAY_PORT": "9000",
        "TIDEGATE_API_KEY": "k",
        "TIDEGATE_SERVICE_TOKEN": "t",
        "TIDEGATE_AMQP_URL": "amqp://user:pw@host/",
        "TIDEGATE_STATE_DIR": "x",
        "TIDEGATE_EMPTY": "",
        "PATH": "/bin",
    }
    assert service.secrets_of(environ) == ["TIDEGATE_AMQP_URL", "TIDEGATE_API_KEY", "TIDEGATE_SERVICE_TOKEN"]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a systemctl that notes how it is called, and with the folders of units."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "systemctl"
    program.write_text(
        f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\n'
        '[ "$1" = show ] || [ "$2" = show ] && echo ActiveState=active\n'
        f'[ -e {tmp_path}/broken ] && {{ echo "it is masked" >&2; exit 1; }}\nexit 0\n'
    )
    program.chmod(0o755)
    for name in [name for name in os.environ if name.startswith("TIDEGATE_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(service, "SYSTEM_UNITS", tmp_path / "units")
    monkeypatch.setattr(service, "BOOTED", tmp_path)
    return tmp_path


Command = Callable[..., tuple[int, str, str]]


def test_installed_and_removed(machine: Path, tidegate: Command):
    code, out, err = tidegate("service", "install", "--user")
    assert code == 0, err
    place = machine / "config" / "systemd" / "user" / "tidegate.service"
    assert place.is_file()
    assert "loginctl enable-linger" in out
    code, out, _ = tidegate("service", "status", "--user", "--json")
    assert (code, '"ActiveState": "active"' in out) == (0, True)
    assert tidegate("service", "uninstall", "--user")[0] == 0
    assert not place.exists()
    calls = (machine / "calls").read_text().splitlines()
    assert [call.removeprefix("--user ").split()[0] for call in calls] == [
        "daemon-reload", "enable", "start", "show", "disable", "daemon-reload",
    ]  # fmt: skip
    assert all(call.startswith("--user ") for call in calls)
    assert tidegate("service", "status", "--user")[0] == 3


def test_what_systemd_refuses_is_told(machine: Path, tidegate: Command):
    (machine / "broken").touch()
    code, _, err = tidegate("service", "install", "--user", "--name", "other")
    assert code == 1
    assert "systemctl --user daemon-reload: it is masked." in err


def test_without_systemd(machine: Path, tidegate: Command, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(service, "BOOTED", machine / "absent")
    code, _, err = tidegate("service", "install", "--user")
    assert code == 1
    assert "systemd does not run on this machine, so nothing was installed" in err
    assert not (machine / "config").exists()
    code, out, _ = tidegate("service", "install", "--user", "--print")
    assert (code, "Type=notify" in out) == (0, True)
    assert tidegate("service", "install", "--user", "--no-start")[0] == 0
