"""Which gateway the SDK calls when it is not told, and which credential goes there."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tidegate import AsyncClient, Client
from tidegate.client import address, started
from tidegate.client import contexts as places
from tidegate.client.contexts import Context, Contexts
from tidegate.kernel.errors import NotFound
from tidegate.kernel.settings.base import Settings

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user in an empty folder, without variables and contexts."""
    for name in ("GATEWAY_URL", "API_KEY", "STATE_DIR", "CONTEXT", "GATEWAY_PORT", "SERVICE_TOKEN"):
        monkeypatch.delenv(f"TIDEGATE_{name}", raising=False)
    monkeypatch.setenv("TIDEGATE_CONFIG_DIR", str(tmp_path / "config"))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")


@pytest.fixture
def contexts(tmp_path: Path) -> Contexts:
    """A stack of this machine on another port, which is current, and one of another machine."""
    state = tmp_path / "project" / ".tidegate"
    (state / "run").mkdir(parents=True)
    (state / "token").write_text("its-token")
    started.write(state, started.of(Settings(state_dir=state, gateway_port=9000), {}))
    local = Context("project", url="http://127.0.0.1:9000", state_dir=str(state))
    found = Contexts(
        "project", {"project": local, "prod": Context("prod", url="http://models:80/", key="tg_prod")}
    )
    places.write(found)
    return found


def test_without_anything_it_is_the_default() -> None:
    assert address.find(None, None) == address.Address("http://127.0.0.1:8000")


def test_the_current_context_is_called_with_its_credential(contexts: Contexts) -> None:
    assert address.find(None, None) == address.Address("http://127.0.0.1:9000", "its-token")
    with Client() as client:
        assert client.url == "http://127.0.0.1:9000"
    waiting = AsyncClient()
    assert waiting.url == client.url
    asyncio.run(waiting.close())


def test_a_context_is_chosen_by_the_environment(contexts: Contexts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEGATE_CONTEXT", "prod")
    assert address.find(None, None) == address.Address("http://models:80", "tg_prod")
    assert address.find(None, "tg_mine").key == "tg_mine"
    monkeypatch.setenv("TIDEGATE_CONTEXT", "prd")
    with pytest.raises(NotFound, match=r"'prd'.*prod, project"):
        Client()


def test_the_credential_of_a_stack_goes_nowhere_else(
    contexts: Contexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert address.find("http://other:1/", None) == address.Address("http://other:1")
    monkeypatch.setenv("TIDEGATE_GATEWAY_URL", "http://stated:2")
    assert address.find(None, None) == address.Address("http://stated:2")
    assert address.find("http://other:1", None).url == "http://other:1", "what is said comes first"


def test_the_key_of_the_environment_is_used_as_errors_say(
    contexts: Contexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDEGATE_API_KEY", "tg_env")
    assert address.find("http://other:1", None).key == "tg_env"
    assert address.find(None, None).key == "tg_env"
    assert address.find("http://other:1", "tg_said").key == "tg_said"
    assert address.find("http://other:1", "").key == "", "nobody is said to call"
