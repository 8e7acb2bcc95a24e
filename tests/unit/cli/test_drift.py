"""Training data as a baseline, and the drift report as text and picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from tidegate.cli import drift
from tidegate.cli.drift_picture import svg
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.training_data import baseline_of
from tidegate.kernel.profiles.baseline import Baseline

SIGNATURE: dict[str, Any] = {
    "inputs": [
        {"name": "x", "datatype": "FP32", "shape": [2]},
        {"name": "city", "datatype": "BYTES", "shape": [1]},
    ]
}


def _csv(folder: Path, heads: str, *rows: str) -> Path:
    path = folder / "data.csv"
    path.write_text("\n".join((heads, *rows)) + "\n")
    return path


def test_the_columns_of_a_csv_are_found_by_name(tmp_path: Path) -> None:
    path = _csv(tmp_path, "x[1],city,x[0],prediction,unused", "1,Bern,2,0,9", ",Oslo,4,1,9", "3,Bern,6,1,9")
    found = Baseline.from_json(baseline_of(path, SIGNATURE))
    assert sorted(found.profile.numbers) == ["city.length", "x[0]", "x[1]"]
    assert found.profile.numbers["x[1]"].missing == 1
    assert found.profile.values["city"].counts == {"Bern": 2, "Oslo": 1}
    assert found.profile.values["prediction"].counts == {"0": 1, "1": 2}


def test_the_columns_of_a_csv_with_other_names_are_taken_in_order(tmp_path: Path) -> None:
    found = Baseline.from_json(baseline_of(_csv(tmp_path, "age,income,town", "1,2,Bern"), SIGNATURE))
    assert sorted(found.profile.numbers) == ["city.length", "x[0]", "x[1]"]


def test_an_npz_has_the_inputs_as_arrays(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    labels = np.array([0, 1, 1])
    np.savez(path, x=np.ones((3, 2), np.float32), city=np.array(["Bern", "Oslo", "Bern"]), prediction=labels)
    found = Baseline.from_json(baseline_of(path, SIGNATURE))
    assert found.profile.rows == 3
    assert found.profile.numbers["x[1]"].mean == 1.0
    assert found.profile.values["city"].counts == {"Bern": 2, "Oslo": 1}


def test_without_a_signature_all_arrays_of_an_npz_count(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, x=np.ones((3, 2), np.float32), prediction=np.array([0, 1, 1]))
    found = Baseline.from_json(baseline_of(path, None))
    assert sorted(found.profile.numbers) == ["x[0]", "x[1]"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.txt", "a", "end with .csv, .npz or .parquet"),
        ("data.csv", "a\n1\n", "the same number of columns in that order"),
        ("data.csv", "x[0],x[1]\n1\n", "line 2 has 1 cells"),
        ("data.csv", "x[0]\n", "no rows"),
        ("data.npz", "no zip", "cannot be read"),
        ("data.parquet", "no parquet", "pyarrow"),
    ],
)
def test_a_file_that_is_no_baseline_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UsageError, match=message.replace(".", r"\.")):
        baseline_of(path, SIGNATURE)


def _column(name: str, state: str, score: float) -> dict[str, Any]:
    return {
        "column": name, "state": state, "score": score, "js": 0.1, "ks": 0.1, "psi": 0.1, "wasserstein": 0.2,
        "js_limit": 0.1, "ks_limit": 0.06, "missing": 0.0, "outside": 0.01, "mean": 1.0, "baseline_mean": 0.9,
    }  # fmt: skip


REPORT: dict[str, Any] = {
    "name": "fraud",
    "items": [
        {
            "model": "fraud",
            "version": 2,
            "state": "drifted",
            "reason": "",
            "drifted": ["a<b"],
            "baseline": {"source": "first_rows", "rows": 3000},
            "window": {"begin": 0, "end": 15, "rows": 3120},
            "columns": [_column("a<b", "drifted", 1.7), _column("c", "steady", 0.3)],
            "worst": [_column("a<b", "drifted", 1.7), _column("c", "steady", 0.3)],
            "histograms": {
                "a<b": {"cuts": [0.0, 1.0], "low": -1.0, "high": 9.0, "baseline": [0.3, 0.4, 0.3],
                        "window": [0.1, 0.4, 0.5]},
                "c": {"cuts": [], "low": 0.0, "high": 0.0, "baseline": [1.0], "window": [1.0]},
            },
            "points": [
                {"begin": 0, "end": 15, "rows": 3000, "state": "suspect", "scores": {"a<b": 1.5},
                 "drifted": []},
                {"begin": 15, "end": 30, "rows": 3000, "state": "drifted", "scores": {"a<b": 1.7, "c": 0.3},
                 "drifted": ["a<b"]},
            ],
            "predecessor": {"version": 1, "state": "suspect", "reason": "",
                            "worst": [_column("a<b", "suspect", 1.2)]},
        }
    ],
}  # fmt: skip


def test_a_report_names_the_columns_that_drifted(capsys: pytest.CaptureFixture[str]) -> None:
    drift.show(REPORT, every=False)
    shown = capsys.readouterr().out
    assert "fraud version 2: drifted, 1 column: a<b" in shown
    assert "baseline: 3,000 rows of its first rows" in shown
    assert "against version 1: a<b" in shown


def test_the_picture_is_well_formed_and_stays_on_the_page() -> None:
    root = ElementTree.fromstring(svg(REPORT["items"][0]))
    texts = [each.text or "" for each in root.iter("{http://www.w3.org/2000/svg}text")]
    assert any("a<b: drifted, score 1.70" in text for text in texts)
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    for text in root.iter("{http://www.w3.org/2000/svg}text"):
        assert 0 <= float(text.attrib["x"]) <= width
        assert 0 <= float(text.attrib["y"]) <= height
