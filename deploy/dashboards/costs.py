"""The dashboard of costs."""

from __future__ import annotations

from deploy.dashboards.panels import Dashboard, Row, Variable, lines, number

_D = 'deployment=~"$deployment"'
# Costs are recorded every ten seconds, so a shorter span has too few points.
_SPAN = "5m"

COSTS = Dashboard(
    "costs",
    "costs",
    "What replicas cost, and for which part of their time, in the currency of the prices (USD by default).",
    (
        number(
            "Per hour, now",
            f"3600 * sum(rate(tidegate_autoscaler_cost_total{{{_D}}}[{_SPAN}]))",
            description="The pace of the last five minutes. `tidegate costs` has the exact sums.",
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
            description="The part of the replicas' time without a call.",
            unit="percentunit",
            width=6,
        ),
        number(
            "Budgets that are used up",
            f"sum(tidegate_autoscaler_over_budget{{{_D}}})",
            description="Deployments: `tidegate costs` shows which budget.",
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
            description="The sum is the mean number of replicas.",
        ),
        lines(
            "Per 1,000 answers",
            (
                f"1000 * sum by (deployment) (rate(tidegate_autoscaler_cost_total{{{_D}}}[{_SPAN}])) "
                f"/ (deployment:tidegate_answers:rate1m{{{_D}}} > 0)",
                "{{deployment}}",
            ),
            unit="none",
            description="All time of the replicas, idle time too. Without streams.",
        ),
        lines(
            "Used-up budgets",
            (f"max by (deployment) (tidegate_autoscaler_over_budget{{{_D}}})", "{{deployment}}"),
            description="1 while a budget of the Deployment is used up.",
        ),
    ),
    (Variable("deployment", "Deployment", "tidegate_autoscaler_cost_total"),),
)
