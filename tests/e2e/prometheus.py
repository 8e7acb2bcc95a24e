"""A real Prometheus beside a stack, and the panels of Grafana's dashboards as queries to it."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.dashboards.__main__ import FOLDER
from tests.conftest import PATIENCE_S
from tests.e2e.conftest import Stack
from tidegate.stack import prometheus
from tidegate.stack.ports import free_ports
from tidegate.stack.standalone import running

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="Prometheus is not installed: apt-get install --no-install-recommends prometheus",
)
INTERVAL_S = 1.0


def credential(stack: Stack) -> tuple[str, str]:
    """The user and the password of a stack's Prometheus."""
    return prometheus.USER, (stack.settings.state_path / "metrics" / "token").read_text().strip()


class Prometheus:
    """The HTTP API of a Prometheus."""

    def __init__(self, stack: Stack, port: int) -> None:
        self._client = httpx.Client(
            base_url=f"http://127.0.0.1:{port}", auth=credential(stack), trust_env=False, timeout=60
        )

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


@contextmanager
def attached(stack: Stack, folder: Path) -> Iterator[Prometheus]:
    """A Prometheus that reads a stack which runs without one."""
    program = prometheus.installed()
    assert program is not None
    (port,) = free_ports(1)
    place = replace(
        prometheus.place(stack.settings), home=folder / "prometheus", port=port, interval_s=INTERVAL_S
    )
    with running([prometheus.child(program, place, os.environ)], folder):
        yield Prometheus(stack, port)


@dataclass(frozen=True)
class Panel:
    """A panel of a dashboard: its title and its queries as Grafana sends them."""

    title: str
    queries: list[str]


def panels(found: Prometheus, name: str, *, every: bool = False) -> list[Panel]:
    """The panels of a dashboard, with the values of its variables; ``every``: with the choice "All"."""
    dashboard = json.loads((FOLDER / f"{name}.json").read_text())
    chosen = {"__rate_interval": "15s"}
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            query = variable["query"]["query"]
            series, label = query.removeprefix("label_values(").rstrip(")").split(", ")
            values = found.ask(f"label/{label}/values", **{"match[]": series})
            assert values or every, query
            chosen[variable["name"]] = variable["allValue"] if every else "|".join(values)
    return [
        Panel(panel["title"], [_filled(target["expr"], chosen) for target in panel["targets"]])
        for panel in dashboard["panels"]
        if panel.get("targets")
    ]


def _filled(expr: str, chosen: dict[str, str]) -> str:
    for name, value in chosen.items():
        expr = expr.replace(f"${name}", value)
    assert "$" not in expr
    return expr


def without_data(found: Prometheus, wanted: list[Panel], empty: set[str]) -> list[str]:
    """The panels none of whose queries has data, except those of ``empty``. Every query must succeed."""
    assert empty <= {panel.title for panel in wanted}
    values = {panel.title: [found.values(query) for query in panel.queries] for panel in wanted}
    return [title for title, each in values.items() if not any(each) and title not in empty]


def until_none(missing: Callable[[], Any], what: str) -> None:
    """Wait until ``missing()`` is empty."""
    end = time.monotonic() + PATIENCE_S
    while left := missing():
        assert time.monotonic() < end, f"{what}: {left}"
        time.sleep(0.5)
