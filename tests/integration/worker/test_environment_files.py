"""The owners of an environment's files, and what a hostile setup may leave in it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from services.worker.adapters import pip_home
from services.worker.adapters.environment_files import hand_over, take_over
from tidegate.kernel.errors import ModelFailed

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(os.geteuid() != 0, reason="root only gives files away"),
]
UID = 2_000_000_000


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """An environment as pip leaves it, with the umask of a sandbox."""
    path = tmp_path / "envs" / "digest"
    (path / "bin").mkdir(parents=True, mode=0o700)
    for name in ("bin/tool", "module.py"):
        (path / name).write_text("x")
        (path / name).chmod(0o700 if name.startswith("bin") else 0o600)
    (path / "lib64").symlink_to("bin")
    hand_over(path, UID)
    return path


def test_an_environment_is_ours_again_and_for_all_to_read(environment: Path) -> None:
    assert (environment / "module.py").stat().st_uid == UID
    (environment / "bin" / "tool").chmod(0o4777)
    take_over(environment, UID)
    assert {path.lstat().st_uid for path in [environment, *environment.rglob("*")]} == {0}
    assert mode(environment / "module.py") == 0o444
    assert mode(environment / "bin" / "tool") == 0o555, "no set-user-ID"
    assert mode(environment / "bin") == 0o755


def test_a_link_to_a_file_of_another_user_is_refused(environment: Path, tmp_path: Path) -> None:
    """Its owner and mode would change together with those of the environment."""
    secret = tmp_path / "secret"
    secret.write_text("secret")
    secret.chmod(0o600)
    os.link(secret, environment / "stolen")
    with pytest.raises(ModelFailed, match="stolen, which belongs to another user"):
        take_over(environment, UID)
    assert mode(secret) == 0o600


def test_a_symbolic_link_is_not_followed(environment: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    secret.chmod(0o600)
    (environment / "link").symlink_to(secret)
    (environment / "folder").symlink_to(tmp_path)
    os.chown(environment / "link", UID, UID, follow_symlinks=False)
    take_over(environment, UID)
    assert mode(secret) == 0o600
    assert mode(tmp_path) == 0o700


def test_the_users_settings_of_pip_go_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user, home = tmp_path / "user", tmp_path / "home"
    home.mkdir()
    for name in (".config/pip/pip.conf", ".pip/pip.conf", "named.conf", ".netrc", "named.netrc"):
        (user / name).parent.mkdir(parents=True, exist_ok=True)
        (user / name).write_text(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(user / "named.conf"))
    given = {
        "HOME": str(user), "PIP_CONFIG_FILE": str(user / "named.conf"), "NETRC": str(user / "named.netrc"),
        "XDG_RUNTIME_DIR": "/run/user/0",
    }  # fmt: skip
    made = pip_home.make(home, given, UID)
    assert made["HOME"] == str(home)
    assert Path(made["PIP_CONFIG_FILE"]).read_text() == "named.conf"
    assert (home / ".config/pip/pip.conf").read_text() == ".config/pip/pip.conf"
    assert (home / ".pip/pip.conf").read_text() == ".pip/pip.conf"
    assert not (home / ".netrc").exists(), "it was the Deployment that named it"
    assert "XDG_RUNTIME_DIR" not in made
    assert {path.stat().st_uid for path in home.rglob("*")} == {UID}
    assert pip_home.make(home, given, None) == given
