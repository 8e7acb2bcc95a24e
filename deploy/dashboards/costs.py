"""The dashboard of costs."""

from __future__ import annotations

from deploy.dashboards.panels import Dashboard, Row, Variable, lines, number

_D = 'deployment=~"$deployment"'
# Costs are recorded every ten seconds, so a shorter time range would contain too few points.
_SPAN = "5m"

COSTS = Dashboard(
    "costs",
    "costs",
    "The cost of replicas, by part of their time, in the currency of the price list (USD by default).",
    (
        number(
            "Per hour, now",
            f"3600 * sum(rate(tidegate_autoscaler_cost_total{{{_D}}}[{_SPAN}]))",
            description="The mean of the last five minutes. `tidegate costs` shows the exact sums.",
            unit="none",
            width=6,
        ),
        number(
            "Last hour", f"sum(increase(tidegate_autoscaler_cost_total{{{_D}}}[1h]))", unit="none", width=6
        ),
        number(
            "Idle",
            f'sum(rate(tidegate_autoscaler_replica_seconds_total{{{_D},part="idle"}}[{_SPAN}])) '
            f"/ (sum(rate(tidegate_autoscaler_replica_seconds_total{{{_D}}}[{_SPAN}])) > 0)",
            description="The share of the replicas' time in which they ran no call.",
            unit="percentunit",
            width=6,
        ),
        number(
            "Budgets that are used up",
            f"sum(tidegate_autoscaler_over_budget{{{_D}}})",
            description="The number of Deployments over budget. `tidegate costs` shows their budgets.",
            red_above=1,
            width=6,
        ),
        Row("Costs"),
        lines(
            "Per hour by Deployment",
            (
                f"3600 * sum by (deployment) (rate(tidegate_autoscaler_cost_total{{{_D}}}[{_SPAN}]))",
                "{{deployment}}",
            ),
            unit="none",
            stacked=True,
        ),
        lines(
            "Per hour by part",
            (f"3600 * sum by (part) (rate(tidegate_autoscaler_cost_total{{{_D}}}[{_SPAN}]))", "{{part}}"),
            unit="none",
            stacked=True,
            description="docs/costs.md explains the parts.",
        ),
        lines(
            "Replicas by part of their time",
            (f"sum by (part) (rate(tidegate_autoscaler_replica_seconds_total{{{_D}}}[{_SPAN}]))", "{{part}}"),
            stacked=True,
            description="The sum of all parts is the mean number of replicas.",
        ),
        lines(
            "Per 1,000 answers",
            (
                f"1000 * sum by (deployment) (rate(tidegate_autoscaler_cost_total{{{_D}}}[{_SPAN}])) "
                f"/ (deployment:tidegate_answers:rate1m{{{_D}}} > 0)",
                "{{deployment}}",
            ),
            unit="none",
            description="The cost of all time of the replicas, including idle time. Streams are not counted "
            "as answers.",
        ),
        lines(
            "Used-up budgets",
            (f"max by (deployment) (tidegate_autoscaler_over_budget{{{_D}}})", "{{deployment}}"),
            description="1 while a budget of the Deployment is used up.",
        ),
    ),
    (Variable("deployment", "Deployment", "tidegate_autoscaler_cost_total"),),
)
