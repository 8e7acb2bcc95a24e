"""The commands of the catalogue: the metadata of options and files, and the rows of a comparison."""

from __future__ import annotations

from pathlib import Path

import pytest

from tidegate.cli import catalogue, metadata_options, retention, serving
from tidegate.cli.exit_codes import UsageError


def test_options_override_single_values_of_a_file(tmp_path):
    file = tmp_path / "about.yaml"
    file.write_text("trained_at: 2026-01-31\nmetrics: {accuracy: 0.9, auc: 0.98}\nowner: ann\n")
    stated = metadata_options.stated(
        metrics=["accuracy=0.95"],
        parameters=["depth=6", "lr=0.1", "shuffle=true", "booster=dart", "big=1e999"],
        framework="xgboost==2.1.0",
        owner="bob",
        license="MIT",
        commit=None,
    )
    assert metadata_options.merged(file, stated) == {
        "trained_at": "2026-01-31T00:00:00Z",
        "metrics": {"accuracy": 0.95, "auc": 0.98},
        "parameters": {"depth": 6, "lr": 0.1, "shuffle": True, "booster": "dart", "big": "1e999"},
        "framework": "xgboost",
        "framework_version": "2.1.0",
        "owner": "bob",
        "license": "MIT",
    }
    assert metadata_options.merged(None, {"owner": "bob"}) == {"owner": "bob"}


def test_a_wrong_file_is_one_clear_error(tmp_path):
    for name, text, words in (
        ("a.yaml", "a: [", "is not YAML"),
        ("a.yml", "- a", "must contain one object"),
        ("a.json", "{", "is not JSON"),
        ("b.json", "[1]", "must contain one object"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(UsageError, match=words):
            metadata_options.read_metadata(tmp_path / name)
    with pytest.raises(UsageError, match="No such file"):
        metadata_options.read_metadata(tmp_path / "absent.yaml")


def test_a_comparison_shows_numbers_with_deltas_and_only_what_differs():
    compared = {
        "metrics": [
            {"name": "accuracy", "a": 0.8, "b": 0.9, "delta": 0.1, "percent": 12.5},
            {"name": "auc", "a": 0.5, "b": 0.5, "delta": 0.0, "percent": 0.0},
            {"name": "f1", "a": None, "b": 1.0, "delta": None, "percent": None},
        ],
        "capacity": [{"name": "load_ms", "a": 10.0, "b": 5.0, "delta": -5.0, "percent": -50.0}],
        "parameters": [{"name": "depth", "a": 6, "b": 8, "same": False}],
        "tags": [{"name": "team", "a": "x", "b": "x", "same": True}],
        "fields": [{"name": "artifact_size", "a": 1000, "b": 2000, "same": False}],
        "requirements_added": ["torch"],
        "requirements_removed": [],
    }
    rows = catalogue.comparison_rows(compared, everything=False)
    assert rows == [
        ("metrics.accuracy", 0.8, 0.9, "+0.1 (+12.5 %)"),
        ("metrics.f1", None, 1.0, ""),
        ("capacity.load_ms", 10.0, 5.0, "-5 (-50 %)"),
        ("parameters.depth", "6", "8", ""),
        ("artifact_size", "1 kB", "2 kB", ""),
        ("requirement", "", "torch", "added"),
    ]
    assert len(catalogue.comparison_rows(compared, everything=True)) == len(rows) + 2


def test_compatibility_is_one_sentence():
    known = {"known": True, "same": False, "compatible": False, "breaking": ["input 'x' is removed"]}
    line = catalogue.compatibility_line
    assert line(known, "a@1", "a@2") == "Callers of a@1 cannot call a@2: input 'x' is removed."
    assert "can call a@2" in line({**known, "compatible": True, "breaking": []}, "a@1", "a@2")
    assert line({**known, "same": True}, "a", "b") == "The signatures are the same."
    assert "cannot be compared" in line({**known, "known": False}, "a", "b")


def test_a_retention_in_words_and_as_a_change():
    change = retention._patch
    assert change(None, None, None, off=False) is None
    assert change(3, "90d", None, off=False) == {"keep_last": 3, "max_age_days": 90}
    assert change(None, None, None, off=True) == {"keep_last": None, "max_age_days": None, "sleeping": None}
    with pytest.raises(UsageError, match="Leave out --keep-last"):
        change(3, None, None, off=True)
    words = retention._shown
    assert words({"keep_last": None, "max_age_days": None}).startswith("Every version is kept")
    assert words({"keep_last": 3, "max_age_days": 90.0}) == (
        "Kept: the newest 3 versions and versions of the last 90 days, and versions in use."
    )


def test_a_reference_names_a_registered_version(tmp_path):
    assert serving.referenced(Path("digits@champion"), None) == (Path("digits"), "champion")
    assert serving.referenced(Path("digits"), "3") == (Path("digits"), "3")
    (tmp_path / "a@b.onnx").write_bytes(b"")
    file = tmp_path / "a@b.onnx"
    assert serving.referenced(file, None) == (file, None), "a file may have this name"
