"""The plan of a stack: its processes, their settings, their stop order."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tidegate.kernel.settings.base import Settings
from tidegate.stack import prometheus, rabbitmq, valkey
from tidegate.stack.child import MARK, Child, Probe
from tidegate.stack.errors import MissingPart
from tidegate.stack.plan import SERVICES, plan

STATE = Path("/srv/state")


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rabbitmq, "_server", lambda: Path("/rabbitmq-server"))
    monkeypatch.setattr(rabbitmq, "_epmd", lambda: "/epmd")
    monkeypatch.setattr(valkey, "_server", lambda: Path("/valkey-server"))
    monkeypatch.setattr(prometheus, "installed", lambda: None)
    monkeypatch.delenv("TIDEGATE_RUNTIME_DIR", raising=False)


def children(environ: dict[str, str] | None = None, **fields: Any) -> dict[str, Child]:
    settings = Settings(state_dir=STATE, service_token="secret", **fields)
    return {child.name: child for child in plan(settings, environ or {})}


def test_every_child_is_planned_once():
    assert list(children()) == [
        "epmd", "rabbitmq", "valkey", "valkey-jobs",
        "migrate", "registry", "router", "autoscaler", "gateway",
    ]  # fmt: skip


def test_a_server_that_a_url_places_elsewhere_is_left_out():
    found = children(
        amqp_url="amqp://user:pw@broker.example:5672/",
        redis_url="redis://store.example/0",
        jobs_url="redis://jobs.example/0",
    )
    assert found.keys().isdisjoint({"epmd", "rabbitmq", "valkey", "valkey-jobs"})
    assert found["gateway"].after == ("registry",)
    assert found["gateway"].env["TIDEGATE_AMQP_URL"] == "amqp://user:pw@broker.example:5672/"


def test_a_server_on_another_port_is_another_server():
    assert "rabbitmq" not in children(amqp_url="amqp://guest:guest@127.0.0.1:18072/")
    assert "valkey" not in children(redis_url="redis://127.0.0.1:18079/0")
    assert "valkey-jobs" not in children(jobs_url="redis://127.0.0.1:18078/0")


def test_persistent_data_has_a_folder_of_its_own():
    found = children(ack_timeout_s=5.5)
    live, jobs = ("\n".join(found[name].files.values()) for name in ("valkey", "valkey-jobs"))
    assert "appendonly no\n" in live
    assert "appendonly yes\nappendfsync always\n" in jobs
    assert set(found["valkey"].folders).isdisjoint(found["valkey-jobs"].folders)
    assert "consumer_timeout = 5500\n" in "\n".join(found["rabbitmq"].files.values())


def test_children_get_the_settings_as_resolved_and_the_mark():
    env = children({"TIDEGATE_GATEWAY_PORT": "1", "LANG": "C"}, gateway_port=9100)["gateway"].env
    assert env["TIDEGATE_GATEWAY_PORT"] == "9100"
    assert env["TIDEGATE_STATE_DIR"] == env[MARK] == str(STATE)
    assert env["TIDEGATE_RUNTIME_DIR"] == str(STATE / "runtime")
    assert env["LANG"] == "C"
    assert "secret" not in env.values()


def test_a_child_stops_after_those_that_need_it():
    order = {name: child.stop_order for name, child in children().items()}
    in_order = ["autoscaler", "gateway", "router", "registry", "valkey", "valkey-jobs", "rabbitmq", "epmd"]
    assert sorted(in_order, key=lambda name: order[name]) == in_order
    assert children()["autoscaler"].after_stop[-2:] == ("services.autoscaler", "sweep")


def test_no_child_waits_for_one_that_is_not_planned():
    for fields in ([], ["amqp_url"], ["redis_url"], ["amqp_url", "redis_url"]):
        found = children({}, **dict.fromkeys(fields, "x://elsewhere/0"))
        assert all(name in found for child in found.values() for name in child.after)


def test_the_broker_is_private():
    node = children({"RABBITMQ_NODENAME": "rabbit@host", "ERL_LIBS": "/elsewhere"})["rabbitmq"]
    assert node.env["RABBITMQ_NODENAME"].endswith("@localhost")
    assert "ERL_LIBS" not in node.env
    assert node.env["ERL_EPMD_ADDRESS"] == "127.0.0.1"
    assert Path(node.env["HOME"]) == STATE / "data" / "rabbitmq"
    assert "{127,0,0,1}" in node.env["RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS"]
    (config,) = (text for path, text in node.files.items() if path.name == "rabbitmq.conf")
    assert "listeners.tcp.1 = 127.0.0.1:8072" in config


def debians(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Make the folders of RabbitMQ's plugins and of Erlang, with both commands."""
    plugins = folder / "rabbitmq_server-3" / "plugins"
    (plugins / "rabbit-3" / "ebin").mkdir(parents=True)
    server, erlang = plugins.parent / "sbin" / "rabbitmq-server", folder / "erlang"
    monkeypatch.setattr(rabbitmq, "DEBIANS", server)
    monkeypatch.setattr(rabbitmq, "_server", lambda: server)
    monkeypatch.setattr(shutil, "which", lambda _: str(erlang / "bin" / "erl"))
    return plugins, erlang


def test_the_broker_searches_the_largest_folders_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plugins, erlang = debians(tmp_path, monkeypatch)
    stdlib = erlang / "lib" / "stdlib-4"
    many = {
        plugins / "rabbit-3": 3,
        plugins / "rabbitmq_prelaunch-3": 1,
        plugins / "rabbitmq_management-3": 9,
        stdlib: 2,
    }
    for app, modules in many.items():
        (app / "ebin").mkdir(parents=True, exist_ok=True)
        for number in range(modules):
            (app / "ebin" / f"{number}.beam").touch()
    (erlang / "releases" / "25").mkdir(parents=True)
    node = children()["rabbitmq"]
    first, second, last = plugins / "rabbit-3", stdlib, plugins / "rabbitmq_prelaunch-3"
    flags = node.env["RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS"]
    # The folder named last is searched first. A plugin that is not used is in none.
    assert flags.endswith(f" -pa {last}/ebin {second}/ebin {first}/ebin")
    assert node.links == {Path(node.env["RABBITMQ_PLUGINS_DIR"], "rabbit"): first}


def test_no_folders_are_named_to_an_erlang_that_caches_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plugins, erlang = debians(tmp_path, monkeypatch)
    (erlang / "releases" / "27").mkdir(parents=True)
    node = children()["rabbitmq"]
    assert " -pa " not in node.env["RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS"]
    assert list(node.links.values()) == [plugins / "rabbit-3"]


def test_a_colon_in_the_path_disables_the_quick_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    debians(tmp_path, monkeypatch)
    _, node = rabbitmq.children(Path("/srv/a:b"), port=1, dist_port=2, epmd_port=3, environ={})
    assert not node.links
    assert "RABBITMQ_PLUGINS_DIR" not in node.env


def test_a_broker_with_another_layout_starts_unchanged():
    node = children()["rabbitmq"]
    assert not node.links
    assert "RABBITMQ_PLUGINS_DIR" not in node.env
    assert " -pa " not in node.env["RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS"]


def test_two_state_folders_have_two_nodes():
    names = {
        rabbitmq.children(Path(home), port=1, dist_port=2, epmd_port=3, environ={})[1].env[
            "RABBITMQ_NODENAME"
        ]
        for home in ("/one", "/two")
    }
    assert len(names) == 2


def test_a_gateway_with_a_certificate_is_probed_over_tls(tmp_path):
    found = children(tls_cert=tmp_path / "cert.pem", tls_key=tmp_path / "key.pem")
    probes = {name: child.probe for name, child in found.items()}
    assert probes["gateway"] == Probe("https", Settings().gateway_port)
    assert probes["registry"] == Probe("http", Settings().registry_port)
    assert found["gateway"].env["TIDEGATE_TLS_KEY"] == str(tmp_path / "key.pem")


def test_a_service_on_every_address_is_probed_on_loopback():
    gateway = children(host="0.0.0.0")["gateway"]
    assert gateway.probe is not None
    assert gateway.probe.host == "127.0.0.1"
    assert gateway.ports[0].host == "0.0.0.0"


def with_prometheus(monkeypatch: pytest.MonkeyPatch, **fields: Any) -> Child:
    monkeypatch.setattr(prometheus, "installed", lambda: "/prometheus")
    monkeypatch.setattr(prometheus, "version_of", lambda _: (2, 42))
    found = children(**fields)
    assert list(found)[-1] == "prometheus"
    return found["prometheus"]


def test_prometheus_is_a_part_if_it_is_installed_and_wanted(monkeypatch: pytest.MonkeyPatch):
    assert "prometheus" not in children()
    with pytest.raises(MissingPart, match="--with-monitoring"):
        children(monitoring="on")
    assert with_prometheus(monkeypatch).optional, "the stack is up without it"
    assert not with_prometheus(monkeypatch, monitoring="on").optional
    assert "prometheus" not in children(monitoring="off")


def test_prometheus_listens_on_loopback_and_keeps_a_limited_history(monkeypatch: pytest.MonkeyPatch):
    server = with_prometheus(
        monkeypatch, host="0.0.0.0", prometheus_port=9999, prometheus_days=0.5, prometheus_max_mb=100
    )
    assert server.ports[0].host == "127.0.0.1"
    assert {
        "--web.listen-address=127.0.0.1:9999",
        "--storage.tsdb.retention.time=43200s",
        "--storage.tsdb.retention.size=100MB",
        f"--storage.tsdb.path={STATE}/data/prometheus/data",
    } <= set(server.argv)


def test_prometheus_stops_before_the_services_and_delays_none(monkeypatch: pytest.MonkeyPatch):
    server = with_prometheus(monkeypatch)
    found = children(monitoring="off")
    assert all(server.stop_order < each.stop_order for each in found.values() if each.probe)
    assert all("prometheus" not in each.after for each in found.values())


def test_prometheus_reads_every_service_with_the_metrics_token(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    server = with_prometheus(monkeypatch, tls_cert=tmp_path / "c.pem", tls_key=tmp_path / "k.pem")
    (config,) = (yaml.safe_load(text) for path, text in server.files.items() if path.name == "prometheus.yml")
    jobs = {each["job_name"]: each for each in config["scrape_configs"]}
    token = {"credentials_file": f"{STATE}/metrics/token"}
    assert {name: jobs[name]["authorization"] for name in SERVICES} == dict.fromkeys(SERVICES, token)
    assert {name: jobs[name]["static_configs"][0]["targets"] for name in SERVICES} == {
        "gateway": ["127.0.0.1:8000"],
        "registry": ["127.0.0.1:8010"],
        "router": ["127.0.0.1:8020"],
        "autoscaler": ["127.0.0.1:8030"],
    }
    assert {name for name in SERVICES if jobs[name].get("scheme") == "https"} == {"gateway"}
    (workers,) = jobs["workers"]["http_sd_configs"]
    assert workers["url"] == "http://127.0.0.1:8030/prometheus/workers"
    assert workers["authorization"] == token


def test_prometheus_without_a_metrics_token_has_no_valid_password(tmp_path: Path):
    assert yaml.safe_load(prometheus.web_config(tmp_path / "token")) == {"basic_auth_users": {"metrics": "!"}}
    (tmp_path / "token").write_text("tgm_1\n")
    users = yaml.safe_load(prometheus.web_config(tmp_path / "token"))["basic_auth_users"]
    assert users["metrics"].startswith("$2b$04$")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (
            "http://alerts.example:9093",
            {"scheme": "http", "static_configs": [{"targets": ["alerts.example:9093"]}]},
        ),
        (
            "https://me:p%40ss@alerts.example/am",
            {
                "scheme": "https",
                "static_configs": [{"targets": ["alerts.example"]}],
                "path_prefix": "/am",
                "basic_auth": {"username": "me", "password": "p@ss"},
            },
        ),
    ],
)
def test_alerts_go_to_an_alertmanager_if_there_is_one(
    monkeypatch: pytest.MonkeyPatch, url: str, expected: dict[str, Any]
):
    def config(**fields: Any) -> Any:
        files = with_prometheus(monkeypatch, **fields).files
        (text,) = (text for path, text in files.items() if path.name == "prometheus.yml")
        return yaml.safe_load(text)

    assert "alerting" not in config()
    assert config(alertmanager_url=url)["alerting"] == {"alertmanagers": [expected]}


@pytest.mark.parametrize(
    ("said", "version", "alerts"),
    [
        ("prometheus, version 2.42.0+ds (branch: debian/sid)", (2, 42), True),
        ("prometheus, version 3.5.0 (branch: HEAD)", (3, 5), True),
        ("prometheus, version 2.31.2+ds1 (branch: debian/sid)", (2, 31), False),
        ("something else", (), False),
    ],
)
def test_an_older_prometheus_gets_only_the_rules_that_it_reads(
    tmp_path: Path, said: str, version: tuple[int, ...], alerts: bool
):
    program = tmp_path / "prometheus"
    program.write_text(f"#!/bin/sh\necho '{said}' >&2\n")
    program.chmod(0o755)
    assert prometheus.version_of(str(program)) == version
    rules = prometheus.place(Settings(state_dir=STATE), version).rules
    assert prometheus.RECORDING in rules
    assert (prometheus.ALERTS in rules) == alerts


def test_a_program_that_cannot_run_has_no_version(tmp_path: Path):
    assert prometheus.version_of(str(tmp_path / "missing")) == ()
