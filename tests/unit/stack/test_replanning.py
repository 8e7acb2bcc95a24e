"""A restart plans the services again: which variables count, and what it refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tidegate.kernel.settings.base import SOURCES, Settings
from tidegate.stack import prometheus, rabbitmq, valkey
from tidegate.stack.child import Child
from tidegate.stack.errors import StackError
from tidegate.stack.plan import plan
from tidegate.stack.replanning import environment, replanned
from tidegate.stack.restarting import RestartRequest


@pytest.fixture
def children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Child, ...]:
    """The children of a stack with TIDEGATE_LOG_LEVEL=DEBUG, whose supervisor is this process."""
    monkeypatch.setattr(rabbitmq, "_server", lambda: Path("/rabbitmq-server"))
    monkeypatch.setattr(rabbitmq, "_epmd", lambda: "/epmd")
    monkeypatch.setattr(valkey, "_server", lambda: Path("/valkey-server"))
    monkeypatch.setattr(prometheus, "installed", lambda: None)
    for name in [name for name in os.environ if name.startswith("TIDEGATE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TIDEGATE_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("TIDEGATE_LOG_LEVEL", "DEBUG")
    (tmp_path / "run").mkdir()
    (tmp_path / "token").write_text("secret")
    (tmp_path / "tidegate.env").write_text("TIDEGATE_AUTH=required\n")
    made = plan(Settings(), os.environ)
    for name, value in made[-1].env.items():
        monkeypatch.setenv(name, value)
    return made


def again(children: tuple[Child, ...], *services: str, **given: str) -> dict[str, Any]:
    found = replanned(children, RestartRequest("1", services, given))
    return {child.name: child.env for child in found.children}


def test_the_settings_file_is_read_again_and_variables_stay(children, tmp_path):
    first = again(children)
    assert list(first) == ["registry", "router", "autoscaler", "gateway"]
    (tmp_path / "tidegate.env").write_text("TIDEGATE_AUTH=loopback\nTIDEGATE_LOG_LEVEL=ERROR\n")
    changed = again(children, "gateway")
    assert list(changed) == ["gateway"]
    assert changed["gateway"]["TIDEGATE_AUTH"] == "loopback"
    assert changed["gateway"]["TIDEGATE_LOG_LEVEL"] == "DEBUG", "the environment overrides the file"
    assert again(children, TIDEGATE_LOG_LEVEL="INFO")["router"]["TIDEGATE_LOG_LEVEL"] == "INFO"


def test_a_setting_that_left_the_file_has_its_default_again(children, tmp_path):
    (tmp_path / "tidegate.env").write_text("")
    assert again(children)["gateway"].get("TIDEGATE_AUTH", "") != "required"


def test_this_process_changes_only_after_the_restart(children, tmp_path):
    before = dict(os.environ)
    found = replanned(children, RestartRequest("1", (), {"TIDEGATE_LOG_LEVEL": "INFO"}))
    assert dict(os.environ) == before
    found.accept()
    assert os.environ["TIDEGATE_LOG_LEVEL"] == "INFO"
    assert json.loads((tmp_path / "run" / "started.json").read_text())["environment"] == {
        "TIDEGATE_LOG_LEVEL": "INFO"
    }
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"TIDEGATE_GATEWAY_PORT": "1"}, r"gateway would listen elsewhere \(TIDEGATE_GATEWAY_PORT or"),
        ({"TIDEGATE_GATEWAY_WORKERS": "2"}, "the number of gateway processes would change from 1 to 2"),
        ({"TIDEGATE_PROFILE": "edge"}, "the stack would have other parts"),
        ({"TIDEGATE_REGISTRY_PORT": "many"}, "A setting is wrong: TIDEGATE_REGISTRY_PORT"),
    ],
)
def test_what_cannot_change_is_refused(children, given, words):
    before = dict(os.environ)
    with pytest.raises(StackError, match=f"Nothing was restarted.*{words}"):
        again(children, **given)
    assert dict(os.environ) == before


def test_the_gateway_is_last_also_in_the_edge_profile(children, monkeypatch):
    monkeypatch.setenv("TIDEGATE_PROFILE", "edge")
    found = again(plan(Settings(), os.environ), TIDEGATE_PROFILE="edge")
    assert [*found] == ["control", "gateway"]


def test_a_request_cannot_move_the_stack():
    present = {"TIDEGATE_STATE_DIR": "/a", "PATH": "/bin", SOURCES: '{"TIDEGATE_STATE_DIR": "default"}'}
    given = {"TIDEGATE_STATE_DIR": "/b", "TIDEGATE_AUTH": "required"}
    assert environment(present, given) == {
        "TIDEGATE_STATE_DIR": "/a", "PATH": "/bin", "TIDEGATE_AUTH": "required",
    }  # fmt: skip
