"""Experiments and feedback on the command line: the pure parts."""

from __future__ import annotations

import csv
import io
import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.router.domain.experiment_report import point_of, report
from services.router.domain.experiment_watch import ExperimentWatch
from tests.unit.router.test_experiment_watch import experiment, record, unit
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.experiment import csv_of, metric_of, moment_of, options_of, rows_of, show
from tidegate.cli.experiment_picture import svg
from tidegate.cli.feedback import lines_of, summary_of
from tidegate.cli.feedback import metric_of as feedback_metric
from tidegate.kernel.protocol.experiments import ExperimentOptions


@pytest.fixture
def found() -> dict[str, Any]:
    """A report after 2,000 outcomes, in which the new version is better."""
    watch, rng = ExperimentWatch("x1"), np.random.default_rng(1)
    for at in range(2000):
        name = ("v1", "v2")[at % 2]
        watch.take(experiment(), record(name, float(rng.normal(1 + (name == "v2"))), unit=unit(at)))
        if at % 200 == 199:
            watch.note(point_of(experiment(), watch, float(at)))
    return report("digits", experiment(), watch)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("score", {"name": "score"}),
        ("score:down:2%", {"name": "score", "goal": "down", "min_lift": 0.02}),
        ("clicks:0.5:up", {"name": "clicks", "min_lift": 0.5, "goal": "up"}),
        ("errors", {"name": "errors", "kind": "errors", "goal": "down"}),
        ("latency:10%", {"name": "latency", "kind": "latency", "goal": "down", "min_lift": 0.1}),
        ("helpful=yes", {"name": "helpful", "kind": "rate", "label": "yes"}),
    ],
)
def test_metrics(text, expected):
    assert metric_of(text) == expected
    ExperimentOptions(metrics=[metric_of(text)])


@pytest.mark.parametrize("text", ["score:soon", "score:0", "score:-1", "score:"])
def test_wrong_metrics(text):
    with pytest.raises(UsageError, match="write NAME, NAME=LABEL"):
        metric_of(text)


def test_options():
    options = options_of(30, ["score"], "header:X-User", 500, "2026-05-01T12:00:00Z")
    read = ExperimentOptions.model_validate(options)
    assert (read.share, read.samples, read.sticky.name) == (30, 500, "X-User")
    assert read.until == datetime(2026, 5, 1, 12, tzinfo=UTC)
    assert options_of(None, None, None, None, None) == {}
    with pytest.raises(UsageError, match="needs a unit"):
        options_of(None, None, "none", None, None)
    now = datetime.now(UTC)
    assert 6.9 < (moment_of("7d") - now).total_seconds() / 86_400 < 7.1
    with pytest.raises(UsageError, match="not a duration"):
        moment_of("tomorrow")


def test_a_report_as_text(found, capsys):
    show(found)
    text = capsys.readouterr().out
    assert "v2 against v1: running. v2 is better than v1 in score." in text
    assert "better" in text
    show({"endpoint": "digits", "experiment": None})
    assert "tidegate rollout digits --to VERSION --ab" in capsys.readouterr().out


def test_a_report_as_csv(found):
    rows = list(csv.DictReader(io.StringIO(csv_of(found))))
    assert len(rows) == len(rows_of(found)) == 8
    assert rows[1]["verdict"] == "better"
    assert float(rows[1]["difference_low"]) > 0
    assert rows[0]["verdict"] == ""


def test_a_report_as_a_picture(found):
    picture = svg(found)
    root = ElementTree.fromstring(picture)
    bands = [each for each in root.iter("{http://www.w3.org/2000/svg}path") if each.get("fill-opacity")]
    assert len(bands) == 1, "only the score has intervals"
    assert "v2 against v1" in picture


def test_feedback_from_a_file(tmp_path: Path):
    file = tmp_path / "feedback.jsonl"
    file.write_text('{"request_id": "a", "score": 1}\n\n{"request_id": "b", "label": "x"}\n')
    assert [each["request_id"] for each in lines_of(file)] == ["a", "b"]
    file.write_text('{"request_id": "a"}\n[1]\n')
    with pytest.raises(UsageError, match="line 2: each line must be a JSON object"):
        list(lines_of(file))
    file.write_text("{broken\n")
    with pytest.raises(UsageError, match="line 1"):
        list(lines_of(file))
    with pytest.raises(UsageError, match="No such file"):
        list(lines_of(tmp_path / "none"))


def test_feedback_options():
    assert feedback_metric(["clicks=3"]) == {"metric": "clicks", "value": 3.0}
    assert feedback_metric(["class=dog"]) == {"metric": "class", "value": "dog"}
    for wrong in (["clicks"], ["=3"], ["a=1", "b=2"], ["a="]):
        with pytest.raises(UsageError, match="one NAME=VALUE"):
            feedback_metric(wrong)
    items = [{"index": 0, "status": "accepted"}, {"index": 1, "status": "unknown", "message": "no"}]
    assert summary_of(items)["refused"] == 1
    assert summary_of(items)["problems"] == [items[1]]
