"""`tidegate settings`: what the services report, and the file of settings that last."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import orjson
import pytest

from services.gateway.settings import GatewaySettings
from services.registry.settings import RegistrySettings
from tidegate.cli.settings import full
from tidegate.client import started
from tidegate.kernel.settings import file as settings_file
from tidegate.kernel.settings.base import Settings
from tidegate.kernel.settings.report import report
from tidegate.stack import processes
from tidegate.stack.record import ChildRecord, RunFolder, StackRecord


@pytest.fixture
def state(plane: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = tmp_path / ".tidegate"
    folder.mkdir()
    return folder


@pytest.fixture
def running(plane: Any, state: Path) -> Any:
    """A gateway and a registry that answer; the file has changed since they started."""
    settings_file.change(state, {"TIDEGATE_AUTH": "required"})
    gateway, registry = GatewaySettings(), RegistrySettings()
    settings_file.change(state, {"TIDEGATE_AUTH": "auto"})
    empty = {"service": "router", "items": [], "problem": ""}

    def answer(request: Any) -> Any:
        import httpx

        port = request.url.port
        found = {8000: report(gateway), 8010: report(registry)}.get(port, empty)
        return httpx.Response(200, json=found)

    plane.answers |= {"GET /v1/settings": answer, "GET /v1/settings/workers": empty}
    return plane


def items(out: str) -> dict[str, dict[str, Any]]:
    return {each["name"]: each for each in orjson.loads(out)["items"]}


def test_the_running_services_are_asked(running: Any, tidegate: Any) -> None:
    code, out, err = tidegate("settings", "--json")
    assert code == 0, err
    found = items(out)
    assert found["TIDEGATE_AUTH"] | {"description": ""} == {
        "name": "TIDEGATE_AUTH",
        "value": "required",
        "source": "file",
        "on_restart": "auto",
        "service": "gateway",
        "description": "",
    }
    assert found["TIDEGATE_HOST"]["service"] == "all"
    assert found["TIDEGATE_MAX_ARTIFACT_BYTES"]["service"] == "registry"
    assert found["TIDEGATE_SERVICE_TOKEN"]["value"] == "********"
    assert len(found) == len(orjson.loads(out)["items"]), "shared settings are told once"


def test_the_list_can_be_narrowed(running: Any, tidegate: Any) -> None:
    assert set(items(tidegate("settings", "--grep", "gateway-grpc", "--json")[1])) == {
        "TIDEGATE_GATEWAY_GRPC_PORT"
    }
    changed = items(tidegate("settings", "--changed", "--json")[1])
    assert "TIDEGATE_AUTH" in changed
    assert "TIDEGATE_GATEWAY_PORT" not in changed


def test_a_service_that_is_away_is_named(running: Any, tidegate: Any) -> None:
    running.down = {"router"}
    code, out, err = tidegate("settings")
    assert code == 6
    assert "TIDEGATE_AUTH" in out
    assert "router does not answer" in err


def test_without_a_stack_the_settings_of_a_start_are_told(plane: Any, state: Path, tidegate: Any) -> None:
    plane.down = {"gateway", "registry", "router", "autoscaler"}
    settings_file.change(state, {"TIDEGATE_AUTH": "required"})
    code, out, _ = tidegate("settings", "--json")
    assert code == 0
    assert orjson.loads(out)["running"] is False
    assert items(out)["TIDEGATE_AUTH"]["value"] == "required"
    assert len(items(out)) >= 100
    assert "No service runs" in tidegate("settings")[2]


def test_set_and_unset(plane: Any, state: Path, tidegate: Any) -> None:
    code, out, _ = tidegate("settings", "set", "auth=required", "TIDEGATE_GATEWAY_PORT=9000")
    assert code == 0
    assert "next `tidegate up`" in out
    assert settings_file.read(state) == {"TIDEGATE_AUTH": "required", "TIDEGATE_GATEWAY_PORT": "9000"}
    document = orjson.loads(tidegate("settings", "unset", "gateway-port", "--json")[1])
    assert document["services"] == ["all"]
    assert settings_file.read(state) == {"TIDEGATE_AUTH": "required"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("set", "AUHT=required"), 1, "Did you mean TIDEGATE_AUTH"),
        (("set", "AUTH=maybe"), 1, "TIDEGATE_AUTH"),
        (("set", "AUTH"), 2, "NAME=VALUE"),
        (("unset", "AUHT"), 1, "Did you mean TIDEGATE_AUTH"),
    ],
)
def test_what_is_wrong_is_not_written(
    plane: Any, state: Path, tidegate: Any, arguments: tuple[str, ...], code: int, message: str
) -> None:
    got, _, err = tidegate("settings", *arguments)
    assert got == code
    assert message in err
    assert not (state / settings_file.NAME).exists()


def test_a_wrong_value_in_the_file_can_be_mended(plane: Any, state: Path, tidegate: Any) -> None:
    settings_file.change(state, {"TIDEGATE_GATEWAY_PORT": "lots", "TIDEGATE_AUHT": "required"})
    code, _, err = tidegate("settings")
    assert code == 1
    assert f".tidegate/{settings_file.NAME}" in err
    assert tidegate("settings", "set", "GATEWAY_PORT=9000")[0] == 0
    assert tidegate("settings", "unset", "AUHT")[0] == 0
    assert settings_file.read(state) == {"TIDEGATE_GATEWAY_PORT": "9000"}


def test_up_refuses_a_wrong_name_in_the_file(plane: Any, state: Path, tidegate: Any) -> None:
    settings_file.change(state, {"TIDEGATE_AUHT": "required"})
    code, _, err = tidegate("up")
    assert code == 1
    assert "Did you mean TIDEGATE_AUTH" in err
    assert not (state / "token").exists()


def test_a_setting_of_the_last_start_is_not_silently_gone(
    plane: Any, state: Path, tidegate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tidegate import stack

    (state / "run").mkdir()
    started.write(state, started.of(Settings(), {"TIDEGATE_AUTH": "required", "TIDEGATE_NOTHING": "1"}))

    def fail(*_: Any) -> None:
        raise stack.StackError("not started here")

    monkeypatch.setattr(stack, "up", fail)
    _, _, err = tidegate("up")
    assert "TIDEGATE_AUTH=required" in err
    assert "tidegate settings set TIDEGATE_AUTH=required" in err
    assert "TIDEGATE_NOTHING" not in err
    os.environ["TIDEGATE_AUTH"] = "required"
    assert "The last start" not in tidegate("up")[2]
    del os.environ["TIDEGATE_AUTH"]


def test_names_may_be_short() -> None:
    assert full("auth") == full("TIDEGATE_AUTH") == "TIDEGATE_AUTH"
    assert full("gateway-port") == "TIDEGATE_GATEWAY_PORT"


@pytest.mark.parametrize(
    ("children", "profile"), [(("registry", "autoscaler"), "autoscaler"), (("control",), "control")]
)
def test_set_names_the_command_of_a_running_stack(
    plane: Any, state: Path, tidegate: Any, children: tuple[str, ...], profile: str
) -> None:
    """Also a variable of the last start, which overrides the file."""
    (state / "run").mkdir()
    records = tuple(ChildRecord(name) for name in (*children, "gateway"))
    supervisor = processes.find(os.getpid())
    RunFolder(state / "run").write(StackRecord("running", supervisor, records))
    given = {"TIDEGATE_CACHE_MAX_BYTES": "100"}
    started.write(state, started.of(Settings(), given))
    code, out, err = tidegate("settings", "set", "CACHE_MAX_BYTES=90")
    assert code == 0, err
    assert f"`tidegate restart {profile}`. Only replicas that start later use it." in " ".join(out.split())
    assert "TIDEGATE_CACHE_MAX_BYTES=100 was set in the environment of the last start" in " ".join(
        err.split()
    )
    code, out, err = tidegate("settings", "set", "CACHE_MAX_BYTES=100")
    assert "environment of the last start" not in err
