"""Prometheus as a part of the stack: what it reads, its rules, and the query of every panel."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from deploy.dashboards.__main__ import FOLDER
from tests.conftest import PATIENCE_S
from tests.e2e.conftest import Digits, Stack, running_stack
from tests.e2e.prometheus import (
    INTERVAL_S,
    Prometheus,
    credential,
    needs_prometheus,
    panels,
    until_none,
    without_data,
)
from tidegate import Client

pytestmark = [pytest.mark.e2e, needs_prometheus]

JOBS = {"gateway", "registry", "router", "autoscaler", "workers"}
# Panels that have no data on this stack: no GPUs, failures, streams, jobs, language models or own RabbitMQ.
EMPTY = {
    "autoscaler": {
        "Ended replicas by cause", "Warm pool", "Ended jobs", "Webhooks", "Published again, expired",
        "Dead letters by cause", "Messages in queues", "Memory of RabbitMQ",
    },
    "endpoint": {
        "First chunk of a stream", "Chunks", "Requests over a limit", "Copies for shadow traffic",
        "Requests that went to another Deployment", "Share of a canary", "Evidence of a canary's harm",
        "Utilization of the GPUs",
    },
    "overview": {"Connections that a server closed early"},
    "drift": {"Score by version", "Columns above their limits", "Score by column", "Quality", "Feedback"},
    "costs": {"Budgets that are used up", "Used-up budgets"},
    "alerts": {"Alerts of Prometheus", "Findings"},
}  # fmt: skip
# `tests/e2e/llm/test_llm_batches.py` has a language model for the panels of these.
WITHOUT_DATA = {"language-models"}

ENDPOINT = """
kind: Endpoint
name: digits
targets: [{deployment: digits-v1}]
slo: {availability: 99.9, latency_ms: 200, latency_target: 99, window: 30d}
"""


@pytest.fixture(scope="module")
def monitored(tmp_path_factory: pytest.TempPathFactory, digits: Digits) -> Iterator[Stack]:
    """A stack that serves the example and reads its metrics every second, with a caller."""
    folder = tmp_path_factory.mktemp("monitored")
    (folder / "endpoint.yaml").write_text(ENDPOINT)
    with running_stack(folder / "state", monitoring="on", scrape_interval_s=INTERVAL_S) as stack:
        stack.deploy(digits.model, "digits", "--min", "1", "--max", "1")
        stack.cli("apply", "-f", str(folder / "endpoint.yaml"))
        stack.autoscaler("/v1/costs")  # a report books the costs at once, instead of within ten seconds
        end = threading.Event()

        def call() -> None:
            with Client(stack.settings.gateway_url, timeout_s=PATIENCE_S) as client:
                while not end.wait(0.05):
                    client.infer("digits", {"image": digits.images[:1]})

        caller = threading.Thread(target=call)
        caller.start()
        try:
            yield stack
        finally:
            end.set()
            caller.join()


@pytest.fixture(scope="module")
def prometheus(monitored: Stack) -> Prometheus:
    return Prometheus(monitored, monitored.settings.prometheus_port)


def test_it_reads_every_part_of_the_stack(monitored: Stack, prometheus: Prometheus):
    def missing() -> Any:
        active = prometheus.ask("targets", state="active")["activeTargets"]
        up = {each["labels"]["job"] for each in active if each["health"] == "up"}
        return [(each["labels"], each["lastError"]) for each in active if each["health"] != "up"] or JOBS - up

    until_none(missing, "targets that are not up")
    (replica,) = monitored.replicas("digits-v1")
    found: list[Any] = []

    def unseen() -> Any:
        found[:] = prometheus.ask("query", query="tidegate_worker_in_hand")["result"]
        return [] if found else "no series"  # a scrape that took too long makes the series stale

    until_none(unseen, "the worker's series")
    (series,) = found
    assert (series["metric"]["deployment"], series["metric"]["replica"]) == ("digits-v1", replica["replica"])


def test_status_shows_it_and_it_listens_on_loopback_only(monitored: Stack):
    port = monitored.settings.prometheus_port
    (row,) = [
        line
        for line in monitored.run("status").stdout.splitlines()
        if "prometheus" in line and "MiB" not in line
    ]
    assert "ready" in row
    assert f"port {port}" in row
    again = monitored.cli("up", "--with-monitoring")
    assert again["prometheus"] == f"http://127.0.0.1:{port}"
    sockets = monitored.child("prometheus").net_connections("tcp")
    assert {each.laddr.ip for each in sockets if each.status == "LISTEN"} == {"127.0.0.1"}


def test_it_needs_the_metrics_token_and_no_other_site_may_read_it(monitored: Stack):
    url = f"http://127.0.0.1:{monitored.settings.prometheus_port}/api/v1/labels"
    for wrong in (None, ("metrics", ""), ("metrics", "!"), ("metrics", monitored.settings.service_token)):
        assert httpx.get(url, auth=wrong, trust_env=False, timeout=PATIENCE_S).status_code == 401
    origin = {"Origin": "http://other.example"}
    answer = httpx.get(url, auth=credential(monitored), headers=origin, trust_env=False, timeout=PATIENCE_S)
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers


def test_every_rule_is_loaded_and_evaluated(prometheus: Prometheus):
    def missing() -> list[Any]:
        rules = [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]
        assert {"endpoint:tidegate_requests:rate1m", "TidegateErrorRate"} <= {rule["name"] for rule in rules}
        return [
            (rule["name"], rule["health"], rule.get("lastError")) for rule in rules if rule["health"] != "ok"
        ]

    until_none(missing, "rules that are not evaluated")


@pytest.mark.parametrize("name", sorted(file.stem for file in FOLDER.glob("*.json")))
def test_the_query_of_every_panel_runs(prometheus: Prometheus, name: str):
    every = name in {"language-models", "drift"}

    def missing() -> list[str]:
        found = panels(prometheus, name, every=every)
        empty = {panel.title for panel in found} if name in WITHOUT_DATA else EMPTY.get(name, set())
        return without_data(prometheus, found, empty)

    until_none(missing, "panels without data")


def test_its_tool_accepts_the_rules_and_the_configuration(monitored: Stack):
    rules = (FOLDER.parent / "monitoring").glob("*.yml")
    config = monitored.settings.state_path / "data" / "prometheus" / "prometheus.yml"
    compose = FOLDER.parent / "prometheus.yml"
    for command in (
        ["rules", *map(str, rules)],
        ["config", str(config)],
        ["config", "--syntax-only", str(compose)],
    ):
        done = subprocess.run(["promtool", "check", *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
