"""Which stack a command talks to: contexts, the environment, and the folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import orjson
import pytest

from tidegate.cli import api, context
from tidegate.cli.exit_codes import UsageError
from tidegate.client import contexts as places
from tidegate.client import started
from tidegate.client.contexts import Context, Contexts, find, find_own
from tidegate.kernel.errors import BadRequest, NotFound
from tidegate.kernel.settings.base import Settings

REMOTE = Context("prod", url="https://models.example.com", key="tg_secret")


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """The state folder of a stack whose gateway was started on another port."""
    folder = tmp_path / "project" / ".tidegate"
    (folder / "run").mkdir(parents=True)
    (folder / "token").write_text("t")
    started.write(folder, started.of(Settings(state_dir=folder, gateway_port=9000), {}))
    return folder


@pytest.fixture
def contexts(state: Path) -> Contexts:
    local = Context("project", url="http://127.0.0.1:9000", state_dir=str(state))
    return Contexts("project", {"project": local, "prod": REMOTE})


def test_the_current_context_is_found_from_any_folder(
    contexts: Contexts, state: Path, tmp_path: Path
) -> None:
    place = find("", {}, tmp_path, contexts)
    assert place.context == "project"
    assert place.fields == {"state_dir": state, "gateway_port": "9000"}
    assert Settings(**place.fields).gateway_url == "http://127.0.0.1:9000"


def test_the_folder_of_a_stack_comes_before_the_current_context(contexts: Contexts, state: Path) -> None:
    place = find("", {}, state.parent, Contexts("prod", contexts.items))
    assert place.fields == {"gateway_port": "9000"}


def test_the_environment_comes_before_both(contexts: Contexts, state: Path) -> None:
    assert find("", {"TIDEGATE_GATEWAY_URL": "http://x"}, state.parent, contexts).fields == {}
    assert find("", {"TIDEGATE_STATE_DIR": "/nowhere"}, state.parent, contexts).fields == {}
    stated = {"TIDEGATE_STATE_DIR": str(state)}
    assert find("", stated, Path("/"), contexts).fields == {"gateway_port": "9000"}
    moved = {"TIDEGATE_GATEWAY_PORT": "9100"}
    assert find("", moved, Path("/"), contexts).fields == {"state_dir": state}


def test_a_chosen_context_comes_before_everything(contexts: Contexts, state: Path) -> None:
    stated = {"TIDEGATE_STATE_DIR": str(state), "TIDEGATE_CONTEXT": "project", "TIDEGATE_API_KEY": "mine"}
    place = find("prod", stated, state.parent, contexts)
    assert place.fields["gateway_url"] == REMOTE.url
    assert place.fields["api_key"] == "tg_secret"
    by_environment = find("", stated | {"TIDEGATE_CONTEXT": "prod"}, state.parent, contexts)
    assert by_environment.fields.get("api_key") is None, "the environment's key is used"


def test_the_token_of_this_machine_is_not_for_another(contexts: Contexts, state: Path) -> None:
    keyless = contexts.having(Context("open", url="http://elsewhere"), current=False)
    fields = find("open", {}, state.parent, keyless).fields
    assert Settings(**fields).service_token == ""


def test_a_state_folder_that_is_gone_says_what_to_do(contexts: Contexts, tmp_path: Path) -> None:
    gone = Contexts("x", {"x": Context("x", state_dir=str(tmp_path / "gone"))})
    with pytest.raises(NotFound, match="tidegate context remove x"):
        find("", {}, tmp_path, gone)


def test_up_starts_no_stack_in_a_foreign_folder(contexts: Contexts, state: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    assert find_own("", {}, tmp_path, contexts, source, starting=True) == source / ".tidegate"
    assert find_own("", {}, state.parent, contexts, source, starting=True) == state
    assert find_own("", {"TIDEGATE_STATE_DIR": "x"}, tmp_path, contexts, source, starting=True) is None
    assert find_own("", {}, tmp_path, contexts, source, starting=False) == state
    with pytest.raises(BadRequest, match="not on this machine"):
        find_own("prod", {}, tmp_path, contexts, source, starting=True)


def test_a_stack_keeps_its_context_and_two_get_two_names(
    contexts: Contexts, state: Path, tmp_path: Path
) -> None:
    assert contexts.name_for(state) == "project"
    assert contexts.name_for(tmp_path / "other" / "project" / ".tidegate") == "project-2"
    assert contexts.name_for(tmp_path / "blue") == "blue"


def test_contexts_are_written_for_their_owner_only(contexts: Contexts, tmp_path: Path) -> None:
    path = places.write(contexts, tmp_path / "config")
    assert path.stat().st_mode & 0o777 == 0o600
    assert places.read(tmp_path / "config") == contexts
    path.write_text("nonsense")
    with pytest.raises(BadRequest, match="not a file of contexts"):
        places.read(tmp_path / "config")


def test_the_config_folder() -> None:
    assert places.config_dir({"XDG_CONFIG_HOME": "/x"}) == Path("/x/tidegate")
    assert places.config_dir({"XDG_CONFIG_HOME": "/x", "TIDEGATE_CONFIG_DIR": "/y"}) == Path("/y")
    assert places.config_dir({}) == Path.home() / ".config" / "tidegate"


def test_what_was_started_is_remembered_without_secrets(tmp_path: Path) -> None:
    environ = {
        "TIDEGATE_AUTH": "required",
        "TIDEGATE_SERVICE_TOKEN": "secret",
        "TIDEGATE_AMQP_URL": "amqp://me:secret@there/",
        "TIDEGATE_STATE_DIR": "x",
        "PATH": "/bin",
    }
    found = started.of(Settings(state_dir=tmp_path), environ)
    assert found.environment == {"TIDEGATE_AUTH": "required"}
    assert started.forgotten(found, {}, {}) == {"TIDEGATE_AUTH": "required"}
    assert started.forgotten(found, {"TIDEGATE_AUTH": "auto"}, {}) == {}
    assert started.forgotten(found, {}, {"TIDEGATE_AUTH": "required"}) == {}


@pytest.fixture
def own_config(plane: Any) -> Path:
    return Path(os.environ["TIDEGATE_CONFIG_DIR"])


def test_the_commands(plane: Any, tidegate: Any, own_config: Path) -> None:
    assert "No context yet" in tidegate("context", "list")[2]
    code, out, _ = tidegate(
        "context", "add", "prod", "--url", "https://models.example.com", "--key", "tg_secret"
    )
    assert code == 0
    assert "Commands use this context now" in out
    assert tidegate("context", "add", "staging", "--url", "https://staging.example.com")[0] == 0
    assert tidegate("context", "use", "staging")[0] == 0
    items = orjson.loads(tidegate("context", "list", "--json")[1])["items"]
    assert [(item["name"], item["current"], item["credential"]) for item in items] == [
        ("prod", False, "key"),
        ("staging", True, "none"),
    ]
    assert "tg_secret" not in tidegate("context", "show", "prod")[1]
    assert tidegate("context", "remove", "staging")[0] == 0
    assert tidegate("context", "show")[0] == 2
    code, _, err = tidegate("context", "use", "staging")
    assert code == 3
    assert "There are: prod." in err


@pytest.mark.parametrize(
    "wrong",
    [
        (),
        ("--url", "models.example.com"),
        ("--url", "http://x", "--state-dir", "."),
        ("--state-dir", "."),
        ("--url", "http://x", "--ca", "missing.pem"),
        ("--url", "http://x", "--key", "a", "--key-file", "b"),
    ],
)
def test_what_cannot_be_a_context_is_refused(
    plane: Any, tidegate: Any, own_config: Path, wrong: tuple[str, ...]
) -> None:
    assert tidegate("context", "add", "x", *wrong)[0] == 2
    assert not own_config.exists()


def test_the_option_before_a_command_chooses(plane: Any, tidegate: Any, own_config: Path) -> None:
    places.write(Contexts("", {"prod": REMOTE}))
    plane.answers["GET /api/registry/v1/models"] = {"items": []}
    plane.answers["GET /api/registry/v1/deployments"] = {"items": []}
    plane.answers["GET /api/registry/v1/endpoints"] = {"items": []}
    assert tidegate("--context", "prod", "models")[0] == 0
    assert "registry GET /api/registry/v1/models" in plane.seen
    assert tidegate("--context", "nobody", "models")[0] == 3
    api.chosen.set("")


def test_a_corrupt_file_is_told_by_every_command(plane: Any, tidegate: Any, own_config: Path) -> None:
    own_config.mkdir()
    (own_config / "contexts.json").write_text("[")
    code, _, err = tidegate("models")
    assert code == 1
    assert "Move it away" in err


def test_a_stack_of_another_machine_is_not_started_from_here() -> None:
    far = api.unreachable("gateway", "https://models.example.com").message
    assert far.endswith("Check the address (tidegate context list), and whether the stack runs there.")
    assert "tidegate up" not in far
    here = api.unreachable("gateway", "http://127.0.0.1:8000").message
    assert here.endswith("Start the stack: tidegate up.")


def test_the_folder_of_another_user_is_not_followed(
    contexts: Contexts, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "is_trusted", lambda owner, user: False)
    with pytest.raises(BadRequest, match=r"belongs to another user.*TIDEGATE_STATE_DIR="):
        find("", {}, state.parent, contexts)
    assert find("", {"TIDEGATE_STATE_DIR": str(state)}, state.parent, contexts).fields
    assert find("prod", {}, state.parent, contexts).context == "prod"


@pytest.mark.parametrize("name", ["../stack/.tidegate", "/srv/stack/.tidegate", ".."])
def test_a_context_cannot_be_called_like_a_stacks_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDEGATE_CONFIG_DIR", str(tmp_path))
    with pytest.raises(UsageError, match="cannot be the name of a context"):
        context.add(name, url="https://elsewhere.example", key=None, key_file=None, ca=None, state_dir=None)
    assert list(tmp_path.iterdir()) == []
