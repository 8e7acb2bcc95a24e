"""The exported rules, as Prometheus reads and evaluates them: ``promtool check rules`` and ``test rules``.

promtool comes with Prometheus. ``TIDEGATE_PROMTOOL`` names another place.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.router.domain.alerts.alert_rules import BY_NAME, RULES
from services.router.domain.alerts.prometheus import rule_file

pytestmark = pytest.mark.unit

PROMTOOL = os.environ.get("TIDEGATE_PROMTOOL") or shutil.which("promtool")
needs_promtool = pytest.mark.skipif(not PROMTOOL, reason="promtool is not installed (apt install prometheus)")
FILE = Path(__file__).parents[3] / "deploy" / "monitoring" / "alerts.yml"
M, MINUTES = 'endpoint="m"', 180
_ = "tidegate_endpoint_"

Series = dict[str, str]


def counters(failed: int, late: int = 0) -> Series:
    """Return 100 requests a minute, of which this many fail or are late."""
    return {
        f"{_}requests_total{{{M}}}": f"0+100x{MINUTES}",
        f"{_}failed_total{{{M}}}": f"0+{failed}x{MINUTES}",
        f"{_}late_total{{{M}}}": f"0+{late}x{MINUTES}",
        f"{_}slo_days{{{M}}}": f"30+0x{MINUTES}",
    }


def constant(name: str, labels: str, value: float) -> Series:
    return {f"{_}{name}{{{labels}}}": f"{value}+0x{MINUTES}"}


def limit(rule: str, value: float) -> Series:
    return constant("alert_limit", f'{M}, rule="{rule}"', value)


def budget(objective: str, value: float) -> Series:
    return constant("slo_budget", f'{M}, objective="{objective}"', value)


# By rule: series with which it fires, and series with which it does not.
CASES: dict[str, tuple[Series, Series]] = {
    "ErrorRate": (counters(10) | limit("ErrorRate", 5), counters(4) | limit("ErrorRate", 5)),
    "ErrorBudgetBurn": (
        counters(2) | budget("availability", 0.001),
        counters(2) | budget("availability", 0.01),
    ),
    "ErrorBudgetBurnSlow": (
        counters(2) | budget("availability", 0.01),
        counters(2) | budget("availability", 0.03),
    ),
    "LatencyBudgetBurn": (
        counters(0, 20) | budget("latency", 0.01),
        counters(0, 1) | budget("latency", 0.01),
    ),
    "LatencyBudgetBurnSlow": (
        counters(0, 2) | budget("latency", 0.01),
        counters(2) | budget("availability", 0.01),
    ),
    "LatencyAboveBaseline": (
        constant("p99_seconds", M, 0.5) | limit("LatencyAboveBaseline", 0.4),
        constant("p99_seconds", M, 0.3) | limit("LatencyAboveBaseline", 0.4),
    ),
    "QueueAge": (
        constant("queue_age_seconds", M, 11) | limit("QueueAge", 10),
        constant("queue_age_seconds", M, 9) | limit("QueueAge", 10),
    ),
    "DeadLetters": (
        constant("dead_letters_recent", M, 1) | limit("DeadLetters", 1),
        constant("dead_letters_recent", M, 0) | limit("DeadLetters", 1),
    ),
    "ReplicaFlapping": (
        constant("restarts_recent", M, 3) | limit("ReplicaFlapping", 3),
        constant("restarts_recent", M, 3),  # the rule is off: there is no limit
    ),
    **{
        name: (constant("finding", f'{M}, rule="{name}"', 1), constant("finding", f'{M}, rule="{name}"', 0))
        for name in ("Drift", "QualityDrop", "CostCap")
    },
}


def promtool(*arguments: str) -> None:
    assert PROMTOOL
    done = subprocess.run([PROMTOOL, *arguments], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def expected(name: str) -> dict[str, Any]:
    rule = BY_NAME[name]
    remedy = rule.remedy.format(endpoint="m")
    labels = {"severity": rule.severity, "endpoint": "m"} | (
        {"rule": name} if name in ("Drift", "QualityDrop", "CostCap") else {}
    )
    return {"exp_labels": labels, "exp_annotations": {"summary": f"m: {rule.description}", "remedy": remedy}}


def test_each_rule_has_a_case():
    assert set(CASES) == {rule.name for rule in RULES}


def test_the_file_has_the_rules():
    assert FILE.read_text() == rule_file(), "run: python -m deploy.alert_rules"


@needs_promtool
def test_prometheus_accepts_the_rules():
    promtool("check", "rules", str(FILE))


@needs_promtool
def test_each_rule_fires_when_it_must_and_only_then(tmp_path: Path):
    tests = [
        {
            "interval": "1m",
            "input_series": [{"series": name, "values": values} for name, values in series.items()],
            "alert_rule_test": [
                {
                    "eval_time": "2h30m",
                    "alertname": f"Tidegate{name}",
                    "exp_alerts": [expected(name)] if fires else [],
                }
            ],
        }
        for name, cases in CASES.items()
        for fires, series in zip((True, False), cases, strict=True)
    ]
    file = tmp_path / "tests.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(FILE)], "evaluation_interval": "1m", "tests": tests}))
    promtool("test", "rules", str(file))
