"""``tidegate costs`` against a control plane in memory."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import orjson
import pytest

from tidegate.cli.cost_picture import svg

ITEM = {
    "deployment": "digits-v1",
    "cost": 0.5,
    "direct": 0.2,
    "overhead": 0.3,
    "token_cost": 0.0,
    "seconds": {"busy": 40.0, "idle": 60.0},
    "requests": 1000,
    "rows": 1000,
    "tokens_in": 0,
    "tokens_out": 0,
    "tokens_cached": 0,
    "per_1000_requests": 0.5,
    "per_1000_tokens": None,
}
REPORT = {
    "since": 1_700_000_000.0,
    "until": 1_700_003_600.0,
    "currency": "EUR",
    "by": "deployment",
    "total": {key: value for key, value in ITEM.items() if key != "deployment"},
    "parts": [
        {"part": "idle", "seconds": 60.0, "cost": 0.3},
        {"part": "busy", "seconds": 40.0, "cost": 0.2},
    ],
    "items": [ITEM],
    "replica_seconds": 100.0,
    "observed_seconds": 100.0,
    "managed": [{"service": "other cloud", "cost": 0.9}],
    "month": {
        "spent": 1.5, "expected": 4.0, "low": 3.0, "high": 5.0, "until": 1.8e9,
        "basis": "the costs of 9 days",
    },
    "idle_per_month": 12.5,
    "problem": None,
    "budgets": [
        {
            "deployment": "digits-v1", "day": 2.0, "max_cost_per_day": 2.0, "month": 2.0,
            "max_cost_per_month": None, "used_up": "the budget of 2 EUR a day is used up",
        }
    ],
}  # fmt: skip
PRICES = {
    "file": None,
    "problem": None,
    "prices": {
        "currency": "EUR", "core_hour": 0.04, "gib_hour": 0.005, "gpu_hour": {"*": {"per_hour": 2.5}},
        "tokens": {"chat": {"in": 0.15, "out": 0.6, "cached": None}},
    },
    "deployments": {
        "digits-v1": {
            "per_hour": 0.5, "cores": 1.0, "memory_gib": 0.25, "gpus": 0.0, "gpu": "", "source": "prices"
        }
    },
}  # fmt: skip


@pytest.fixture
def plane(plane: Any) -> Any:
    plane.answers |= {
        "GET /v1/costs": REPORT,
        "GET /v1/prices": PRICES,
        "GET /v1/deployments/digits-v1": {"name": "digits-v1"},
        "POST /v1/replay": {
            "results": [
                {
                    "name": "max_replicas=1", "replica_hours": 3.0, "late": 7, "late_share": 0.07,
                    "wait_p95_ms": 812.0, "most_replicas": 1, "cost": None,
                }
            ]
        },
    }  # fmt: skip
    return plane


def test_the_report(plane: Any, tidegate: Any) -> None:
    code, shown, _ = tidegate("costs")
    assert code == 0
    for words in (
        "0.5000 EUR for 0.03 replica-hours",
        "idle                60.0%",
        "80 % interval: 3.0000 to 5.0000",
        "Idle time costs 12.5000 EUR",
        "2.0000 of 2 EUR a day (100%)",
        "the budget of 2 EUR a day is used up",
        "At other cloud, the same would cost 0.9000 EUR",
    ):
        assert words in shown, words


def test_keys_have_names(plane: Any, tidegate: Any) -> None:
    item = {key: value for key, value in ITEM.items() if key != "deployment"} | {"key": "ab12"}
    plane.answers["GET /v1/costs"] = REPORT | {"by": "key", "items": [item]}
    assert "ab12" in tidegate("costs", "--by", "key")[1], "keys cannot be listed"
    plane.answers["GET /v1/keys"] = {"items": [{"id": "ab12", "name": "robot"}]}
    assert "robot" in tidegate("costs", "--by", "key")[1]


def test_csv_has_a_column_for_each_part(plane: Any, tidegate: Any) -> None:
    (row,) = csv.DictReader(io.StringIO(tidegate("costs", "--csv")[1]))
    assert (row["deployment"], row["cost"], row["busy_seconds"], row["wasted_seconds"]) == (
        "digits-v1",
        "0.5",
        "40.0",
        "0",
    )


def test_what_a_smaller_maximum_would_have_cost(plane: Any, tidegate: Any) -> None:
    _, shown, _ = tidegate("costs", "digits-v1", "--what-if", "max_replicas=1", "--since", "2h", "--json")
    (found,) = orjson.loads(shown)["what_if"]
    assert (found["name"], found["cost"], found["late"]) == ("max_replicas=1", 1.5, 7)
    order = orjson.loads(plane.bodies[plane.seen.index("autoscaler POST /v1/replay")])
    assert order["arrivals"]["until"] - order["arrivals"]["since"] == pytest.approx(7200, abs=5)
    assert order["policies"] == [{"name": "max_replicas=1", "changes": {"max_replicas": 1}}]


def test_prices(plane: Any, tidegate: Any) -> None:
    shown = tidegate("costs", "--prices")[1]
    assert "TIDEGATE_PRICES" in shown
    assert "million tokens in, chat" in shown


@pytest.mark.parametrize(
    "wrong", [("--by", "colour"), ("--since", "yesterday"), ("--what-if", "max_replicas=1")]
)
def test_wrong_options(plane: Any, tidegate: Any, wrong: tuple[str, str]) -> None:
    assert tidegate("costs", *wrong)[0] == 2


def test_the_picture_is_a_valid_svg(plane: Any, tidegate: Any, tmp_path: Path) -> None:
    path = tmp_path / "costs.svg"
    assert tidegate("costs", "--plot", str(path))[0] == 0
    root = ElementTree.fromstring(path.read_text())
    bars = [each for each in root.iter() if each.tag.endswith("rect") and each.get("height") == "20"]
    assert len(bars) == 2
    busy, idle = (float(each.get("width") or 0) for each in bars)
    assert busy / idle == pytest.approx(40 / 60, rel=0.01)


def test_a_name_in_the_picture_is_escaped() -> None:
    hostile = REPORT | {"items": [ITEM | {"deployment": "<script>"}]}
    assert "<script>" not in svg(hostile)
