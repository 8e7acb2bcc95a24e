"""The sources of settings, the file in the state folder and the environment, and the report about them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from deploy import settings_check
from services.gateway.settings import GatewaySettings
from tidegate.kernel.settings import file as settings_file
from tidegate.kernel.settings.base import SOURCES, Settings, is_secret
from tidegate.kernel.settings.report import report, shown
from tidegate.stack import rabbitmq, valkey
from tidegate.stack.plan import plan


@pytest.fixture(autouse=True)
def state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No TIDEGATE_* in the environment but the state folder, which is empty."""
    for name in [name for name in os.environ if name.startswith("TIDEGATE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TIDEGATE_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


def item(settings: Settings, name: str) -> dict[str, str | None]:
    (found,) = [each for each in report(settings)["items"] if each["name"] == name]
    return {key: found[key] for key in ("value", "source", "on_restart")}


def test_the_file_is_read_and_the_environment_comes_first(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings_file.change(state, {"TIDEGATE_AUTH": "required", "TIDEGATE_GATEWAY_PORT": "9000"})
    found = GatewaySettings()
    assert (found.auth, found.gateway_port, found.gateway_url) == ("required", 9000, "http://127.0.0.1:9000")
    monkeypatch.setenv("TIDEGATE_AUTH", "auto")
    assert GatewaySettings().auth == "auto"


def test_each_value_says_where_it_came_from(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings_file.change(state, {"TIDEGATE_AUTH": "required"})
    monkeypatch.setenv("TIDEGATE_LOG_LEVEL", "DEBUG")
    sources = GatewaySettings().sources()
    assert sources["auth"] == "file"
    assert sources["log_level"] == "environment"
    assert sources["gateway_port"] == "default"
    assert sources["database_url"] == "computed"


def test_what_a_restart_would_change_is_told(state: Path) -> None:
    settings_file.change(state, {"TIDEGATE_AUTH": "required"})
    running = GatewaySettings()
    assert item(running, "TIDEGATE_AUTH")["on_restart"] is None
    settings_file.change(state, {"TIDEGATE_AUTH": None, "TIDEGATE_GATEWAY_PORT": "9000"})
    assert item(running, "TIDEGATE_AUTH") == {"value": "required", "source": "file", "on_restart": "auto"}
    assert item(running, "TIDEGATE_GATEWAY_PORT")["on_restart"] == "9000"
    assert item(running, "TIDEGATE_GATEWAY_URL")["on_restart"] == "http://127.0.0.1:9000"


def test_a_file_that_became_wrong_is_told(state: Path) -> None:
    running = GatewaySettings()
    settings_file.change(state, {"TIDEGATE_AUTH": "maybe"})
    assert "TIDEGATE_AUTH" in report(running)["problem"]
    assert item(running, "TIDEGATE_AUTH")["on_restart"] is None


def test_services_have_the_files_values_as_of_the_start(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rabbitmq, "_server", lambda: Path("/rabbitmq-server"))
    monkeypatch.setattr(rabbitmq, "_epmd", lambda: "/epmd")
    monkeypatch.setattr(valkey, "_server", lambda: Path("/valkey-server"))
    settings_file.change(state, {"TIDEGATE_AUTH": "required", "TIDEGATE_LOG_LEVEL": "DEBUG"})
    monkeypatch.setenv("TIDEGATE_GATEWAY_PORT", "9000")
    env = plan(Settings(), os.environ)[-1].env
    assert (env["TIDEGATE_AUTH"], env["TIDEGATE_LOG_LEVEL"]) == ("required", "DEBUG")
    sources = json.loads(env[SOURCES])
    assert (sources["TIDEGATE_AUTH"], sources["TIDEGATE_LOG_LEVEL"]) == ("file", "file")
    assert sources["TIDEGATE_GATEWAY_URL"] == "computed"
    assert "TIDEGATE_GATEWAY_PORT" not in sources
    assert sources["TIDEGATE_RUNTIME_DIR"] == "default"
    # What the supervisor makes of it is the same: it plans again in that environment.
    found = GatewaySettings.of(env).sources()
    assert (found["auth"], found["log_level"]) == ("file", "file")
    assert (found["gateway_port"], found["gateway_url"], found["host"]) == (
        "environment",
        "computed",
        "default",
    )
    again = plan(Settings.of(env), env)[-1].env
    assert again == env


def test_secrets_are_masked() -> None:
    assert shown("service_token", "abc", "file") == "********"
    assert shown("service_token", "", "default") == ""
    assert shown("amqp_url", "amqp://me:pw@h:1/", "environment") == "amqp://me:********@h:1/"
    assert shown("amqp_url", "amqp://gateway:pw@h:1/", "computed") == "amqp://h:1/"
    assert (
        shown("database_url", "postgresql+asyncpg://me:pw@h/db", "file")
        == "postgresql+asyncpg://me:********@h/db"
    )


def test_the_file_keeps_its_comments_and_is_for_its_owner(state: Path) -> None:
    path = settings_file.change(state, {"TIDEGATE_JWT_ISSUER": "https://id.example.com/a b$c"})
    path.write_text("# who may call\n" + path.read_text())
    settings_file.change(state, {"TIDEGATE_AUTH": "required"})
    settings_file.change(state, {"TIDEGATE_AUTH": None})
    assert path.read_text().startswith("# who may call\n")
    assert settings_file.read(state) == {"TIDEGATE_JWT_ISSUER": "https://id.example.com/a b$c"}
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"TIDEGATE_AUHT": "required"}, "no setting TIDEGATE_AUHT. Did you mean TIDEGATE_AUTH"),
        ({"TIDEGATE_AUTH": "maybe"}, "TIDEGATE_AUTH: Input should be 'auto' or 'required'"),
        ({"TIDEGATE_GATEWAY_WORKERS": "0"}, "TIDEGATE_GATEWAY_WORKERS: "),
        ({"TIDEGATE_AUTOSCALER_WARM": "{"}, "TIDEGATE_AUTOSCALER_WARM"),
        ({"TIDEGATE_STATE_DIR": "/x"}, "set it in the environment"),
        ({"TIDEGATE_TLS_CERT": "cert.pem"}, "set both, or neither"),
        ({"PATH": "/bin"}, "There is no setting PATH."),
    ],
)
def test_what_is_wrong_is_told_before_it_is_written(values: dict[str, str], message: str) -> None:
    (problem, *_) = settings_check.problems(values)
    assert message in problem


def test_a_misspelled_variable_is_found_and_others_are_left_alone() -> None:
    environ = {
        "TIDEGATE_AUHT": "required",
        "TIDEGATE_PYTHON": "python3",
        "TIDEGATE_AUTH": "auto",
        "PATH": "/bin",
    }
    assert settings_check.misspelled(environ) == {"TIDEGATE_AUHT": "TIDEGATE_AUTH"}
    ours = ("TIDEGATE_STACK", "TIDEGATE_CONFIG_DIR", "TIDEGATE_CONTEXT", "TIDEGATE_SETTING_SOURCES")
    assert settings_check.misspelled(dict.fromkeys(ours, "x")) == {}


def test_what_is_right_has_no_problem() -> None:
    right = {
        "TIDEGATE_AUTH": "required",
        "TIDEGATE_AUTOSCALER_WARM": '{"cpu": 1}',
        "TIDEGATE_LOG_LEVEL": "DEBUG",
    }
    assert settings_check.problems(right) == []


def test_every_setting_of_the_docs_is_reported() -> None:
    page = (Path(__file__).parents[3] / "docs" / "settings.md").read_text()
    listed = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `TIDEGATE_")}
    reported = {each["name"] for part in settings_check.planned() for each in part["items"]}
    assert reported == listed
    assert len(listed) >= 100


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+asyncpg://host/db?user=u&password=hunter2",
        "https://host/?sig=hunter2",
        "https://u:hunter2@host/?token=hunter2",
        "http://[hunter2",
    ],
)
def test_a_secret_within_a_url_is_not_told(url: str) -> None:
    assert "hunter2" not in shown("database_url", url, "environment")
    assert is_secret("TIDEGATE_DATABASE_URL", url)


def test_plain_options_of_a_url_are_told() -> None:
    url = "postgresql+asyncpg://host/db?ssl=require"
    assert shown("database_url", url, "environment") == url
    assert not is_secret("TIDEGATE_DATABASE_URL", url)


def test_a_file_of_another_user_says_nothing(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings_file.change(state, {"TIDEGATE_GATEWAY_URL": "http://elsewhere.example"})
    owner = (state / settings_file.NAME).stat().st_uid
    assert settings_file.read(state)
    monkeypatch.setattr("tidegate.kernel.settings.file.is_trusted", lambda found, me: (found, me) == (1, 2))
    assert settings_file.read(state) == {}
    monkeypatch.undo()
    assert settings_file.is_trusted(owner, owner)
    assert settings_file.is_trusted(0, 1000)
    assert settings_file.is_trusted(1000, 0)
    assert not settings_file.is_trusted(1001, 1000)
