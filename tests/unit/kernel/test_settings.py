"""Settings: defaults that follow from each other, and the environment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from services.gateway.settings import GatewaySettings
from tidegate.kernel.settings.base import Settings

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path):
    """No TIDEGATE_* in the environment, no state in the current folder."""
    for name in [name for name in os.environ if name.upper().startswith("TIDEGATE_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def test_defaults(tmp_path):
    found = Settings()
    assert (found.host, found.log_level, found.service_token) == ("127.0.0.1", "INFO", "")
    assert (found.gateway_port, found.registry_port, found.router_port, found.autoscaler_port) == (
        8000,
        8010,
        8020,
        8030,
    )
    assert found.state_path == tmp_path / ".tidegate"
    assert found.runtime_path == tmp_path / ".tidegate" / "runtime"


def test_addresses_follow_from_ports_and_folders(tmp_path):
    found = Settings(rabbitmq_port=1, valkey_port=2, registry_port=3, jobs_port=4, state_dir=Path("state"))
    assert found.amqp_url == "amqp://127.0.0.1:1/"
    assert found.redis_url == "redis://127.0.0.1:2/0"
    assert found.jobs_url == "redis://127.0.0.1:4/0"
    assert found.registry_url == "http://127.0.0.1:3"
    assert found.database_url == f"sqlite+aiosqlite:///{tmp_path}/state/data/registry.db"
    assert found.artifact_url == f"file://{tmp_path}/state/data/artifacts"


def test_what_is_given_is_not_derived():
    found = Settings(amqp_url="amqp://elsewhere/", registry_url="http://registry:80")
    assert (found.amqp_url, found.registry_url) == ("amqp://elsewhere/", "http://registry:80")


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://127.0.0.1:8000"),
        ("10.0.0.7", "http://10.0.0.7:8000"),
        ("::1", "http://[::1]:8000"),
    ],
)
def test_services_are_reached_where_they_listen(host, url):
    assert Settings(host=host).gateway_url == url


def test_a_certificate_makes_the_gateways_url_https():
    found = Settings(tls_cert=Path("cert.pem"), tls_key=Path("key.pem"))
    assert (found.gateway_url, found.registry_url) == ("https://127.0.0.1:8000", "http://127.0.0.1:8010")
    assert found.tls_cert == Path("cert.pem").absolute(), "the services may run in another folder"


@pytest.mark.parametrize("one", ["tls_cert", "tls_key"])
def test_a_certificate_and_its_key_go_together(one):
    with pytest.raises(ValueError, match="TIDEGATE_TLS_CERT and TIDEGATE_TLS_KEY go together"):
        Settings.model_validate({one: Path("file.pem")})


def test_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("TIDEGATE_STATE_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("TIDEGATE_GATEWAY_PORT", "9000")
    monkeypatch.setenv("TIDEGATE_MAX_BODY_BYTES", "1024")
    monkeypatch.setenv("TIDEGATE_SOMETHING_ELSE", "passed over")
    found = GatewaySettings()
    assert found.state_path == tmp_path / "elsewhere"
    assert found.gateway_url == "http://127.0.0.1:9000"
    assert found.max_body_bytes == 1024


def test_empty_means_the_default(monkeypatch):
    monkeypatch.setenv("TIDEGATE_GATEWAY_PORT", "")
    monkeypatch.setenv("TIDEGATE_AMQP_URL", "")
    monkeypatch.setenv("TIDEGATE_RUNTIME_DIR", "")
    found = Settings()
    assert (found.gateway_port, found.runtime_dir) == (8000, None)
    assert found.amqp_url == "amqp://127.0.0.1:8072/"


def test_a_wrong_value_names_its_field(monkeypatch):
    monkeypatch.setenv("TIDEGATE_GATEWAY_PORT", "many")
    with pytest.raises(ValueError, match="gateway_port"):
        Settings()


def test_the_token_of_the_state_folder(monkeypatch, tmp_path):
    state = tmp_path / ".tidegate"
    state.mkdir()
    (state / "token").write_text("kept\n")
    assert Settings().service_token == "kept"
    monkeypatch.setenv("TIDEGATE_SERVICE_TOKEN", "told")
    assert Settings().service_token == "told"


def test_folders_are_absolute_whatever_is_given(tmp_path):
    assert Settings(state_dir=Path("a/b")).state_path == tmp_path / "a" / "b"
    assert Settings(runtime_dir=Path("rt")).runtime_path == tmp_path / "rt"
