"""A real Prometheus as a part of the stack: what it reads, its rules, and the query of every panel."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.dashboards.__main__ import FOLDER
from tests.conftest import PATIENCE_S
from tests.e2e.conftest import Digits, Stack, running_stack
from tidegate import Client

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        shutil.which("prometheus") is None or shutil.which("promtool") is None,
        reason="Prometheus is not installed: apt-get install --no-install-recommends prometheus",
    ),
]

JOBS = {"gateway", "registry", "router", "autoscaler", "workers"}
# Panels that have no data on this stack: it has no failures, streams, jobs, language models or own RabbitMQ.
EMPTY = {
    "autoscaler": {
        "Ended replicas by cause", "Warm pool", "Ended jobs", "Webhooks", "Published again, expired",
        "Dead letters by cause", "Messages in queues", "Memory of RabbitMQ",
    },
    "endpoint": {"First chunk of a stream", "Chunks", "Requests over a limit", "Copies for shadow traffic"},
    "overview": {"Connections that a server closed early"},
    "drift": {"Score by version", "Columns above their limits", "Score by column", "Quality", "Feedback"},
    "alerts": {"Alerts of Prometheus", "Findings"},
}  # fmt: skip

ENDPOINT = """
kind: Endpoint
name: digits
targets: [{deployment: digits-v1}]
slo: {availability: 99.9, latency_ms: 200, latency_target: 99, window: 30d}
"""


def credential(stack: Stack) -> tuple[str, str]:
    return "metrics", (stack.settings.state_path / "metrics" / "token").read_text().strip()


class Prometheus:
    """The HTTP API of the stack's Prometheus."""

    def __init__(self, stack: Stack) -> None:
        url = f"http://127.0.0.1:{stack.settings.prometheus_port}"
        self._client = httpx.Client(base_url=url, auth=credential(stack), trust_env=False, timeout=60)

    def ask(self, path: str, **params: Any) -> Any:
        """The data of a call, which must succeed without a warning."""
        answer = self._client.get(f"/api/v1/{path}", params=params)
        document = answer.json()
        assert answer.status_code == 200, document
        assert document["status"] == "success", document
        assert not document.get("warnings"), document
        return document["data"]

    def values(self, expr: str) -> list[float]:
        """The finite values of a query over the last minute, as a panel shows it."""
        now = time.time()
        data = self.ask("query_range", query=expr, start=now - 60, end=now, step=5)
        found = (float(value) for series in data["result"] for _, value in series["values"])
        return [value for value in found if math.isfinite(value)]


@pytest.fixture(scope="module")
def monitored(tmp_path_factory: pytest.TempPathFactory, digits: Digits) -> Iterator[Stack]:
    """A stack that serves the example and reads its metrics every second, with a caller."""
    state = tmp_path_factory.mktemp("monitored") / "state"
    with running_stack(state, monitoring="on", scrape_interval_s=1) as stack:
        stack.deploy(digits.model, "digits", "--min", "1", "--max", "1")
        file = state.parent / "endpoint.yaml"
        file.write_text(ENDPOINT)
        stack.cli("apply", str(file))
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
    return Prometheus(monitored)


def until(found: Any, what: str) -> None:
    """Wait until ``found()`` is empty: the things that are still missing."""
    end = time.monotonic() + PATIENCE_S
    while missing := found():
        assert time.monotonic() < end, f"{what}: {missing}"
        time.sleep(0.5)


def test_it_reads_every_part_of_the_stack(monitored: Stack, prometheus: Prometheus):
    def missing() -> Any:
        active = prometheus.ask("targets", state="active")["activeTargets"]
        up = {each["labels"]["job"] for each in active if each["health"] == "up"}
        return [(each["labels"], each["lastError"]) for each in active if each["health"] != "up"] or JOBS - up

    until(missing, "targets that are not up")
    (replica,) = monitored.replicas("digits-v1")
    (series,) = prometheus.ask("query", query="tidegate_worker_in_hand")["result"]
    assert (series["metric"]["deployment"], series["metric"]["replica"]) == ("digits-v1", replica["replica"])


def test_status_shows_it_and_it_listens_on_loopback_only(monitored: Stack):
    port = monitored.settings.prometheus_port
    (row,) = [line for line in monitored.run("status").stdout.splitlines() if "prometheus" in line]
    assert "ready" in row
    assert f"port {port}" in row
    again = monitored.cli("up", "--with-monitoring")
    assert again["prometheus"] == f"http://127.0.0.1:{port}"
    sockets = monitored.child("prometheus").net_connections("tcp")
    assert {each.laddr.ip for each in sockets if each.status == "LISTEN"} == {"127.0.0.1"}


def test_it_needs_the_metrics_token_and_no_other_site_may_read_it(monitored: Stack):
    url = f"http://127.0.0.1:{monitored.settings.prometheus_port}/api/v1/labels"
    for wrong in (None, ("metrics", ""), ("metrics", "!"), ("metrics", monitored.settings.service_token)):
        assert httpx.get(url, auth=wrong, trust_env=False).status_code == 401
    origin = {"Origin": "http://other.example"}
    answer = httpx.get(url, auth=credential(monitored), headers=origin, trust_env=False)
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers


def test_every_rule_is_loaded_and_evaluated(prometheus: Prometheus):
    def missing() -> list[Any]:
        rules = [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]
        assert {"endpoint:tidegate_requests:rate1m", "TidegateErrorRate"} <= {rule["name"] for rule in rules}
        return [
            (rule["name"], rule["health"], rule.get("lastError")) for rule in rules if rule["health"] != "ok"
        ]

    until(missing, "rules that are not evaluated")


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.json")), ids=lambda file: file.stem)
def test_the_query_of_every_panel_runs(prometheus: Prometheus, file: Path):
    dashboard = json.loads(file.read_text())
    chosen = _choices(prometheus, dashboard, all_=file.stem in {"language-models", "drift"})
    panels = [panel for panel in dashboard["panels"] if panel.get("targets")]
    empty = EMPTY.get(file.stem, set())
    assert empty <= {panel["title"] for panel in panels}
    for panel in panels:
        for target in panel["targets"]:
            prometheus.values(_filled(target["expr"], chosen))
    if file.stem == "language-models":
        return

    def missing() -> list[str]:
        return [
            panel["title"]
            for panel in panels
            if panel["title"] not in empty
            and not any(prometheus.values(_filled(target["expr"], chosen)) for target in panel["targets"])
        ]

    until(missing, "panels without data")


def _choices(prometheus: Prometheus, dashboard: Any, *, all_: bool) -> dict[str, str]:
    """A value for each variable, of its own query; with ``all_``: that of the choice "All"."""
    found = {}
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            series, label = variable["definition"].removeprefix("label_values(").rstrip(")").split(", ")
            values = prometheus.ask(f"label/{label}/values", **{"match[]": series})
            assert values or all_, variable["definition"]
            found[variable["name"]] = variable["allValue"] if all_ else "|".join(values)
    return found


def _filled(expr: str, chosen: dict[str, str]) -> str:
    """The expression as Grafana sends it."""
    for name, value in {"__rate_interval": "15s", **chosen}.items():
        expr = expr.replace(f"${name}", value)
    assert "$" not in expr.replace('"$1"', "")
    return expr


def test_its_tool_accepts_the_rules_and_the_configuration(monitored: Stack):
    rules = [*(FOLDER.parent / "monitoring").glob("*.yml"), FOLDER.parent / "alert-rules.yml"]
    config = monitored.settings.state_path / "data" / "prometheus" / "prometheus.yml"
    compose = FOLDER.parent / "prometheus.yml"
    for command in (
        ["rules", *map(str, rules)],
        ["config", str(config)],
        ["config", "--syntax-only", str(compose)],
    ):
        done = subprocess.run(["promtool", "check", *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
