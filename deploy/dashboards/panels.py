"""Build panels, variables and dashboards as JSON for Grafana 10 and newer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

SCHEMA = 39  # the schema version of Grafana 10.4; newer releases convert it
COLUMNS = 24
SOURCE = {"type": "prometheus", "uid": "${datasource}"}

Json = dict[str, Any]
Kind = Literal["timeseries", "stat", "heatmap", "table"]


@dataclass(frozen=True, slots=True)
class Query:
    """A query, and the template for the names of its series in the legend."""

    expr: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """A panel. A number that is at least ``red_above`` is red. ``stacked``: True if curves are stacked."""

    title: str
    queries: tuple[Query, ...]
    unit: str = "short"
    description: str = ""
    kind: Kind = "timeseries"
    width: int = 12
    height: int = 8
    stacked: bool = False
    red_above: float | None = None
    highest: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """A heading above panels."""

    title: str


@dataclass(frozen=True, slots=True)
class Variable:
    """A menu of a dashboard. Grafana fills the menu with the values of a Prometheus label.

    ``name``: this Prometheus label. ``series``: the metric from which Grafana reads the label's values.
    ``label``: the text beside the menu.
    """

    name: str
    label: str
    series: str


@dataclass(frozen=True, slots=True)
class Dashboard:
    """A dashboard. ``name``: the name of its file, and the end of its uid."""

    name: str
    title: str
    description: str
    items: tuple[Panel | Row, ...]
    variables: tuple[Variable, ...] = ()


ENDPOINT = Variable("endpoint", "Endpoint", "endpoint:tidegate_requests:rate1m")
DEPLOYMENT = Variable("deployment", "Deployment", "deployment:tidegate_replicas:count")


def lines(title: str, *queries: tuple[str, str], **options: Any) -> Panel:
    """Return a panel of curves. Each query is an expression and the legend of its series."""
    return Panel(title, tuple(Query(*each) for each in queries), **options)


def number(title: str, expr: str, **options: Any) -> Panel:
    """Return a panel with one large number."""
    defaults: Json = {"kind": "stat", "width": 3, "height": 4}
    return replace(Panel(title, (Query(expr),)), **(defaults | options))


def as_json(dashboard: Dashboard) -> Json:
    """Return the dashboard as JSON for Grafana."""
    return {
        "uid": f"tidegate-{dashboard.name}",
        "title": f"Tidegate: {dashboard.title}",
        "description": dashboard.description,
        "tags": ["tidegate"],
        "schemaVersion": SCHEMA,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": []},
        "links": [_LINKS],
        "templating": {"list": [_DATASOURCE, *map(_variable, dashboard.variables)]},
        "panels": _placed(dashboard.items),
    }


_LINKS: Json = {
    "type": "dashboards",
    "title": "Tidegate",
    "tooltip": "The other dashboards of Tidegate",
    "icon": "external link",
    "url": "",
    "targetBlank": False,
    "tags": ["tidegate"],
    "asDropdown": True,
    "includeVars": True,
    "keepTime": True,
}
_DATASOURCE: Json = {
    "type": "datasource",
    "name": "datasource",
    "label": "Prometheus",
    "query": "prometheus",
    "options": [],
    "hide": 0,
    "includeAll": False,
    "multi": False,
    "refresh": 1,
    "regex": "",
}


def _variable(variable: Variable) -> Json:
    query = f"label_values({variable.series}, {variable.name})"
    return {
        "type": "query",
        "name": variable.name,
        "label": variable.label,
        "datasource": SOURCE,
        "query": {"qryType": 1, "query": query, "refId": variable.name},
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "options": [],
        "includeAll": True,
        "allValue": ".+",
        "multi": True,
        "refresh": 2,
        "sort": 1,
        "hide": 0,
        "regex": "",
    }


def _placed(items: Sequence[Panel | Row]) -> list[Json]:
    """Return the panels with their positions on the dashboard.

    A heading begins a new line, and so does a panel that does not fit in the current line.
    """
    found: list[Json] = []
    x = y = tallest = 0
    for number, item in enumerate(items, start=1):
        width, height = (COLUMNS, 1) if isinstance(item, Row) else (item.width, item.height)
        if x + width > COLUMNS or isinstance(item, Row):
            x, y, tallest = 0, y + tallest, 0
        place = {"x": x, "y": y, "w": width, "h": height}
        found.append(
            {"id": number, "gridPos": place, **(_row(item) if isinstance(item, Row) else _panel(item))}
        )
        x, tallest = x + width, max(tallest, height)
    return found


def _row(row: Row) -> Json:
    return {"type": "row", "title": row.title, "collapsed": False, "panels": []}


def _panel(panel: Panel) -> Json:
    defaults: Json = {"unit": panel.unit, "color": {"mode": "palette-classic"}, "min": 0}
    if panel.highest is not None:
        defaults["max"] = panel.highest
    if panel.kind == "stat":
        defaults |= {"color": {"mode": "thresholds"}, "thresholds": _thresholds(panel.red_above)}
    if panel.kind == "timeseries":
        defaults["custom"] = _curves(panel.stacked)
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": _OPTIONS[panel.kind],
        "targets": [_target(at, query, panel.kind) for at, query in enumerate(panel.queries)],
    }


def _thresholds(red_above: float | None) -> Json:
    steps: list[Json] = [{"color": "green", "value": None}]
    if red_above is not None:
        steps.append({"color": "red", "value": red_above})
    return {"mode": "absolute", "steps": steps}


def _curves(stacked: bool) -> Json:
    return {
        "drawStyle": "line",
        "lineWidth": 1,
        "fillOpacity": 40 if stacked else 8,
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
    }


_LAST: Json = {"calcs": ["lastNotNull"], "fields": "", "values": False}
_OPTIONS: dict[Kind, Json] = {
    "timeseries": {
        "legend": {
            "displayMode": "table",
            "placement": "bottom",
            "showLegend": True,
            "calcs": ["lastNotNull", "max"],
        },
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {
        "reduceOptions": _LAST,
        "colorMode": "value",
        "graphMode": "area",
        "justifyMode": "auto",
        "orientation": "auto",
        "textMode": "auto",
    },
    "heatmap": {
        "calculate": False,
        "cellGap": 1,
        "color": {
            "mode": "scheme",
            "scheme": "Oranges",
            "steps": 64,
            "exponent": 0.5,
            "reverse": False,
            "fill": "dark-orange",
        },
        "yAxis": {"axisPlacement": "left", "unit": "s"},
        "legend": {"show": True},
        "tooltip": {"mode": "single", "yHistogram": False},
    },
    "table": {"showHeader": True, "cellHeight": "sm", "footer": {"show": False, "reducer": ["sum"]}},
}


def _target(at: int, query: Query, kind: Kind) -> Json:
    instant = kind == "table"
    return {
        "refId": chr(ord("A") + at),
        "datasource": SOURCE,
        "editorMode": "code",
        "expr": query.expr,
        "legendFormat": query.legend or "__auto",
        "format": {"heatmap": "heatmap", "table": "table"}.get(kind, "time_series"),
        "range": not instant,
        "instant": instant,
    }
