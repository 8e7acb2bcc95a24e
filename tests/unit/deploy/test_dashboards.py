"""Dashboards and recording rules: they are up to date, and name only metrics and labels that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.dashboards.__main__ import FOLDER, texts
from deploy.dashboards.panels import Dashboard, Panel, Query, Row, as_json
from tidegate.kernel import errors
from tidegate.kernel.service.error_answers import status_of

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[3]
RULES = yaml.safe_load((ROOT / "deploy" / "monitoring" / "rules.yml").read_text())
RECORDED = {rule["record"]: rule["expr"] for group in RULES["groups"] for rule in group["rules"]}
ROW = re.compile(r"^\| `(tidegate_\w+)` \| (\w+) \|([^|]*)\|", re.M)
SELECTED = re.compile(r"\b((?:\w+:)*(?:tidegate|rabbitmq|process)_\w+(?::\w+)*)(?:\{([^}]*)\})?")
# Prometheus adds these labels: the first two to all series, the others to those of workers.
ADDED = {"job", "instance", "deployment", "replica"}
# Of the Python client and of RabbitMQ's plugin.
OTHERS = {
    "process_cpu_seconds_total", "process_resident_memory_bytes", "rabbitmq_queue_messages_ready",
    "rabbitmq_queue_messages_unacked", "rabbitmq_process_resident_memory_bytes",
}  # fmt: skip


def metrics() -> dict[str, set[str]]:
    """The labels of each series that a page of metrics has."""
    found: dict[str, set[str]] = {}
    for name, kind, labels in ROW.findall((ROOT / "docs" / "metrics.md").read_text()):
        names = set(re.findall(r"`(\w+)`", labels))
        parts = {"_bucket": {"le"}, "_sum": set(), "_count": set()} if kind == "histogram" else {"": set()}
        found |= {name + part: names | more for part, more in parts.items()}
    return found | {name: set() for name in OTHERS}


def wrong(expr: str) -> list[str]:
    """The names in an expression that no page of metrics and no recording rule has."""
    known = metrics()
    found = []
    for name, labels in SELECTED.findall(expr):
        if name not in known and name not in RECORDED:
            found.append(name)
        if name in known:
            found += [label for label in re.findall(r"(\w+)=", labels) if label not in known[name] | ADDED]
    return found


def dashboards() -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}


def expressions(dashboard: Any) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]


def test_a_wrong_name_or_label_is_found():
    assert wrong('rate(tidegate_gateway_request_total{model="x"}[1m])') == ["tidegate_gateway_request_total"]
    assert wrong('tidegate_gateway_requests_total{endpoint="x"}') == ["endpoint"]
    assert wrong('endpoint:tidegate_requests:rate2m{endpoint="x"}') == ["endpoint:tidegate_requests:rate2m"]
    assert not wrong('rate(tidegate_gateway_request_seconds_bucket{deployment=~"x",le="1"}[1m])')


def test_the_files_are_up_to_date():
    assert {path: path.read_text() for path in FOLDER.glob("*.json")} == texts(), "run `make docs`"


@pytest.mark.parametrize("name", dashboards())
def test_a_dashboard_names_only_metrics_that_exist(name: str):
    found = expressions(dashboards()[name])
    assert found
    assert {expr: names for expr in found if (names := wrong(expr))} == {}


def test_recording_rules_name_only_metrics_that_exist():
    assert {name: names for name, expr in RECORDED.items() if (names := wrong(expr))} == {}


def test_variables_are_declared_and_used():
    for name, dashboard in dashboards().items():
        declared = {each["name"] for each in dashboard["templating"]["list"]} - {"datasource"}
        used = set(re.findall(r"\$(\w+)", " ".join(expressions(dashboard)))) - {"__rate_interval"}
        assert used == declared, name


def test_dashboards_have_their_own_uid_and_panels_do_not_overlap():
    found = dashboards()
    assert len({each["uid"] for each in found.values()}) == len(found)
    for name, dashboard in found.items():
        taken: set[tuple[int, int]] = set()
        for panel in dashboard["panels"]:
            at = panel["gridPos"]
            cells = {
                (x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
            }
            assert not cells & taken, (name, panel["title"])
            assert at["x"] + at["w"] <= 24
            taken |= cells


def test_panels_fill_a_line_before_the_next_one():
    wide = Panel("wide", (Query("up"),))
    small = Panel("small", (Query("up"),), width=4, height=4)
    made = as_json(Dashboard("x", "x", "", (small, wide, wide, Row("row"), small)))
    places = [(each["gridPos"]["x"], each["gridPos"]["y"]) for each in made["panels"]]
    assert places == [(0, 0), (4, 0), (0, 8), (0, 16), (0, 17)]
    assert all(one["id"] < other["id"] for one, other in pairwise(made["panels"]))


def test_failures_are_the_errors_that_the_gateway_answers_with_500_and_more():
    (listed,) = re.findall(r'outcome=~"([^"]+)"', RECORDED["endpoint:tidegate_failures:rate1m"])
    more = {
        each.reason: each for each in (errors.TidegateError, errors.WorkerLost, errors.UpstreamUnavailable)
    }
    wanted = {reason for reason, kind in (errors.BY_REASON | more).items() if status_of(kind("")) >= 500}
    assert set(listed.split("|")) == wanted


@pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool (Debian's prometheus) is not installed"
)
def test_the_recording_rules_compute_what_they_say():
    file = Path(__file__).with_name("rules_test.yml")
    done = subprocess.run(["promtool", "test", "rules", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
