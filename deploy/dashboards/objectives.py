"""The dashboard of alerts and objectives."""

from __future__ import annotations

from deploy.dashboards.panels import Dashboard, Panel, Query, Row, Variable, lines, number

_E = 'endpoint=~"$endpoint"'

ALERTS = Dashboard(
    "alerts",
    "alerts and objectives",
    "Firing alerts, the burn rates of error budgets, and the watched numbers with their limits.",
    (
        number("Firing", 'max(tidegate_alerts{state="firing"})', red_above=1, width=6),
        number("Pending", 'max(tidegate_alerts{state="pending"})', width=6),
        number(
            "Fastest burn rate in 1 hour",
            f"max(endpoint:tidegate_burn_rate:1h{{{_E}}})",
            description="At 1, the error budget lasts exactly for the window of the objective.",
            red_above=1,
            width=6,
        ),
        number("Endpoints with an objective", "count(tidegate_endpoint_slo_days)", width=6),
        Panel(
            "Alerts of Prometheus",
            (Query('ALERTS{alertname=~"Tidegate.*"}'),),
            kind="table",
            width=24,
            description="`tidegate alerts` shows Tidegate's own alerts, with values and remedies.",
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
                description="A burn rate of 14.4 for one hour uses up 2 % of a 30-day error budget.",
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
            description="The limit is computed from the endpoint's own past.",
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
            description="Counts of the last 15 minutes.",
        ),
        lines(
            "Findings",
            (f"max by (endpoint, rule) (tidegate_endpoint_finding{{{_E}}})", "{{endpoint}} {{rule}}"),
            description="1 while an endpoint has drift, or has a drop in quality, or while the cost of a "
            "Deployment limits the number of replicas.",
        ),
    ),
    (Variable("endpoint", "Endpoint", "tidegate_endpoint_requests_total"),),
)
