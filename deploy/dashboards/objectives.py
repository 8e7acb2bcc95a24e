"""The dashboard of alerts and objectives."""

from __future__ import annotations

from deploy.dashboards.panels import Dashboard, Panel, Query, Row, Variable, lines, number

_E = 'endpoint=~"$endpoint"'

ALERTS = Dashboard(
    "alerts",
    "alerts and objectives",
    "What fires, how fast the budgets of objectives burn, and how far the numbers are from their limits.",
    (
        number("Firing", 'max(tidegate_alerts{state="firing"})', red_above=1, width=6),
        number("Pending", 'max(tidegate_alerts{state="pending"})', width=6),
        number(
            "Fastest burn rate in 1 hour",
            f"max(endpoint:tidegate_burn_rate:1h{{{_E}}})",
            description="1: the budget lasts exactly for the window of the objective.",
            red_above=1,
            width=6,
        ),
        number("Endpoints with an objective", "count(tidegate_endpoint_slo_days)", width=6),
        Panel(
            "Alerts of Prometheus",
            (Query('ALERTS{alertname=~"Tidegate.*"}'),),
            kind="table",
            width=24,
            description="`tidegate alerts` shows Tidegate's own, with values and remedies.",
        ),
        Row("Objectives"),
        *(
            lines(
                f"Burn rate: {objective}",
                *(
                    (
                        f'endpoint:tidegate_burn_rate:{window}{{{_E},objective="{objective}"}}',
                        f"{{{{endpoint}}}} {name}",
                    )
                    for window, name in (("5m", "5 minutes"), ("1h", "1 hour"), ("6h", "6 hours"))
                ),
                description="14.4 in one hour spends 2 % of a budget of 30 days.",
            )
            for objective in ("availability", "latency")
        ),
        Row("Numbers and their limits"),
        lines(
            "p99",
            (f"max by (endpoint) (tidegate_endpoint_p99_seconds{{{_E}}})", "{{endpoint}}"),
            (
                f'max by (endpoint) (tidegate_endpoint_alert_limit{{{_E},rule="LatencyAboveBaseline"}})',
                "{{endpoint}} limit",
            ),
            unit="s",
            description="The limit follows the endpoint's own past.",
        ),
        lines(
            "Age of the queue",
            (f"max by (endpoint) (tidegate_endpoint_queue_age_seconds{{{_E}}})", "{{endpoint}}"),
            (
                f'max by (endpoint) (tidegate_endpoint_alert_limit{{{_E},rule="QueueAge"}})',
                "{{endpoint}} limit",
            ),
            unit="s",
        ),
        lines(
            "Dead letters, unexpected ends of replicas",
            (
                f"max by (endpoint) (tidegate_endpoint_dead_letters_recent{{{_E}}})",
                "{{endpoint}} dead letters",
            ),
            (f"max by (endpoint) (tidegate_endpoint_restarts_recent{{{_E}}})", "{{endpoint}} ends"),
            description="In 15 minutes.",
        ),
        lines(
            "Findings",
            (f"max by (endpoint, rule) (tidegate_endpoint_finding{{{_E}}})", "{{endpoint}} {{rule}}"),
            description="Drift, a drop of quality, or a cap of cost.",
        ),
    ),
    (Variable("endpoint", "Endpoint", "tidegate_endpoint_requests_total"),),
)
