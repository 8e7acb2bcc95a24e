"""The alert rules as a file for Prometheus and Alertmanager. Pure.

The rules read the router's metrics of endpoints (docs/metrics.md). These metrics contain each endpoint's
limits. So one file serves all endpoints, and does not change when endpoints change.
"""

from __future__ import annotations

from collections.abc import Sequence

from services.router.domain.alerts.alert_rules import RULES, Rule

_HEAD = """\
# Tidegate's alerts for Prometheus. Made by `tidegate alerts --export prometheus`.
groups:
  - name: tidegate
    rules:
"""


def rule_file(rules: Sequence[Rule] = RULES) -> str:
    """Return the rules as YAML."""
    return _HEAD + "".join(map(_entry, rules))


def _entry(rule: Rule) -> str:
    remedy = rule.remedy.format(endpoint="{{ $labels.endpoint }}")
    return (
        f"      - alert: Tidegate{rule.name}\n"
        f"        expr: {_quoted(rule.expression)}\n"
        f"        for: {rule.for_s:.0f}s\n"
        f"        keep_firing_for: {rule.keep_s:.0f}s\n"
        f"        labels: {{severity: {rule.severity}}}\n"
        f"        annotations:\n"
        f"          summary: {_quoted('{{ $labels.endpoint }}: ' + rule.description)}\n"
        f"          remedy: {_quoted(remedy)}\n"
    )


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
