"""``docs/metrics.md`` tells of every metric that there is, and of no other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "metrics.md"
TYPES = {"Counter": "counter", "Gauge": "gauge", "Histogram": "histogram", "Summary": "summary"}
ROW = re.compile(r"^\| `(tidegate_\w+)` \| (\w+) \|([^|]*)\|", re.M)
NAME = re.compile(r"\btidegate_\w+")
LABELS_AT = 2

# Name as scraped -> type and labels.
Metrics = dict[str, tuple[str, tuple[str, ...]]]


@pytest.fixture(scope="module")
def exposed() -> Metrics:
    """What the code makes."""
    paths = [path for folder in ("services", "tidegate") for path in (ROOT / folder).rglob("*.py")]
    sources = [source for path in paths if "prometheus_client" in (source := path.read_text())]
    return dict(found for source in sources for found in made(source))


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text()


def made(source: str) -> Iterator[tuple[str, tuple[str, tuple[str, ...]]]]:
    """The metrics that a module makes. Their names and labels are written out, or this fails."""
    imported: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "prometheus_client":
            imported |= {alias.name for alias in node.names}
            assert not any(alias.asname for alias in node.names), "imported under another name"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in imported:
            if node.func.id not in TYPES:
                continue
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            labels = node.args[LABELS_AT] if len(node.args) > LABELS_AT else keywords.get("labelnames")
            name, type_ = str(ast.literal_eval(node.args[0])), TYPES[node.func.id]
            if type_ == "counter":
                name = f"{name.removesuffix('_total')}_total"
            yield name, (type_, tuple(ast.literal_eval(labels)) if labels else ())


def test_there_is_a_row_for_each_metric_with_its_type_and_labels(exposed: Metrics, page: str):
    rows = {name: (type_, tuple(re.findall(r"`(\w+)`", labels))) for name, type_, labels in ROW.findall(page)}
    assert rows == exposed


def test_no_metric_has_two_rows(page: str):
    names = [name for name, _, _ in ROW.findall(page)]
    assert len(names) == len(set(names))


def test_every_name_on_the_page_is_scraped(exposed: Metrics, page: str):
    histograms = {name for name, (type_, _) in exposed.items() if type_ == "histogram"}
    parts = {f"{name}_{part}" for name in histograms for part in ("bucket", "sum", "count")}
    assert set(NAME.findall(page)) <= exposed.keys() | parts
