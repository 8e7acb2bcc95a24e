"""Decisions about the compose stack: images, and the state of containers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from deploy.compose.images import OFFICIAL, STAND_INS, absent, stand_ins
from deploy.compose.stack import states
from deploy.compose.tool import FILE, SERVICE
from tidegate.stack import prometheus
from tidegate.stack.plan import SERVICES


def test_stand_ins_are_used_only_without_a_setting_and_an_official_image():
    everything = set(STAND_INS.values())
    assert stand_ins({}, everything) == STAND_INS
    assert stand_ins({}, set()) == {}
    assert "TIDEGATE_VALKEY_IMAGE" not in stand_ins({}, everything | {OFFICIAL["TIDEGATE_VALKEY_IMAGE"]})
    assert "TIDEGATE_VALKEY_IMAGE" not in stand_ins({"TIDEGATE_VALKEY_IMAGE": "mine"}, everything)


def test_images_that_would_have_to_be_pulled():
    assert absent({}, set(STAND_INS.values())) == []
    assert absent({}, set(OFFICIAL.values())) == []
    assert set(absent({}, set())) == set(OFFICIAL.values())
    assert "mine" in absent({"TIDEGATE_VALKEY_IMAGE": "mine"}, set(STAND_INS.values()))


def test_compose_yaml_has_the_same_official_images():
    found = dict(re.findall(r"\$\{(TIDEGATE_[A-Z]+_IMAGE):-([^}]+)\}", FILE.read_text()))
    assert {name: found[name] for name in OFFICIAL} == OFFICIAL


def test_compose_yaml_uses_only_what_both_tools_support():
    document = yaml.safe_load(FILE.read_text())
    assert "name" not in document, "docker-compose 1.29 refuses it"
    assert "version" not in document, "Compose v2 warns of it"


def test_only_the_proxy_gets_the_socket_and_only_the_registry_the_database():
    services = yaml.safe_load(FILE.read_text())["services"]
    sockets = {name for name, each in services.items() if "docker.sock" in str(each.get("volumes"))}
    assert sockets == {"engine-proxy"}
    assert {n for n, s in services.items() if "engine" in s.get("networks", ())} == {
        "autoscaler",
        "engine-proxy",
    }
    on_database = {name for name, each in services.items() if "database" in each.get("networks", ())}
    assert on_database == {"postgres", "registry", "migrate"}


def test_prometheus_gets_the_metrics_token_and_no_other():
    services = yaml.safe_load(FILE.read_text())["services"]
    mounted = {volume.split(":")[0]: volume.split(":")[1] for volume in services["prometheus"]["volumes"]}
    assert "state" not in mounted
    with_metrics = {n for n, s in services.items() if any("metrics:" in v for v in s.get("volumes", ()))}
    assert with_metrics == {"migrate", "prometheus"}
    scraped = yaml.safe_load((FILE.parent / "prometheus.yml").read_text())["scrape_configs"]
    jobs = {each["job_name"]: each for each in scraped}
    token = {"credentials_file": f"{mounted['metrics']}/token"}
    assert {name: jobs[name]["authorization"] for name in SERVICES} == dict.fromkeys(SERVICES, token)
    assert jobs["workers"]["http_sd_configs"][0]["authorization"] == token


def test_both_stacks_have_the_same_metrics_and_rules():
    """The embedded stack's configuration is made by a function, that of compose is a file."""
    mine = yaml.safe_load((FILE.parent / "prometheus.yml").read_text())
    targets = {"gateway": "gateway:8000", "registry": "registry:8010"}
    targets |= {"router": "router:8020", "autoscaler": "autoscaler:8030"}
    place = prometheus.Place(
        Path("/prometheus"),
        9090,
        targets,
        frozenset(),
        Path("/etc/prometheus/tidegate/token"),
        5.0,
        rules=(Path("/etc/prometheus/rules/rules.yml"), Path("/etc/prometheus/rules/alerts.yml")),
    )
    made = yaml.safe_load(prometheus.config(place))
    jobs = [each for each in mine["scrape_configs"] if each["job_name"] != "rabbitmq"]
    (workers,) = made["scrape_configs"][-1]["http_sd_configs"]
    workers["refresh_interval"] = "5s"
    assert jobs == made["scrape_configs"]
    limits = {each["job_name"]: each["sample_limit"] for each in mine["scrape_configs"]}
    assert limits == dict.fromkeys([*SERVICES, "workers", "rabbitmq"], prometheus.PAGE_SAMPLES)
    assert mine["rule_files"] == made["rule_files"]
    mounted = yaml.safe_load(FILE.read_text())["services"]["prometheus"]["volumes"]
    inside = {line.split(":")[1]: FILE.parent / line.split(":")[0] for line in mounted if line[0] == "."}
    assert all((inside[str(Path(file).parent)] / Path(file).name).is_file() for file in mine["rule_files"])


def test_grafana_is_only_started_with_its_profile_and_gets_the_dashboards():
    services = yaml.safe_load(FILE.read_text())["services"]
    assert [name for name, each in services.items() if each.get("profiles")] == ["grafana"]
    mounted = {line.split(":")[0]: line.split(":")[1] for line in services["grafana"]["volumes"]}
    folder = FILE.parent / "grafana" / "provisioning"
    (provider,) = yaml.safe_load((folder / "dashboards" / "tidegate.yaml").read_text())["providers"]
    assert provider["options"]["path"] == mounted["./grafana"]
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (FILE.parent / "grafana" / home.rsplit("/", 1)[1]).is_file()
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"


def test_every_long_running_service_has_a_healthcheck_and_few_rights():
    services = yaml.safe_load(FILE.read_text())["services"]
    for name, each in services.items():
        assert each["security_opt"] == ["no-new-privileges:true"], name
        if each.get("restart") != "no":
            assert each["healthcheck"]["test"], name


def container(service: str, **state):
    labels = {SERVICE: service} | ({"tidegate.replica": "x-0-1"} if service == "launched" else {})
    usual = {"Status": "running", "Running": True, "ExitCode": 0}
    return {"Name": f"/{service}", "Config": {"Labels": labels}, "State": {**usual, **state}}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (container("gateway", Health={"Status": "healthy"}), "healthy"),
        (container("gateway", Health={"Status": "starting"}), "waiting"),
        (container("gateway", Health={"Status": "unhealthy"}), "broken"),
        (container("gateway", Running=False, Status="exited", ExitCode=1), "broken"),
        (container("gateway", Running=False, Status="created"), "waiting"),
        (container("gateway", Running=False, Status="restarting", Restarting=True), "waiting"),
        (container("gateway"), "healthy"),
        (container("migrate"), "waiting"),
        (container("migrate", Running=False, Status="exited"), "healthy"),
        (container("migrate", Running=False, Status="exited", ExitCode=1), "broken"),
    ],
)
def test_the_state_of_a_container(given, expected):
    assert states([given]) == [(given["Name"][1:], expected)]


def test_workers_are_not_waited_for():
    assert states([container("launched")]) == []
