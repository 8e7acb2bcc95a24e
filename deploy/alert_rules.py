"""``python -m deploy.alert_rules``: write Prometheus's alerting rules to ``deploy/monitoring/alerts.yml``."""

from __future__ import annotations

from pathlib import Path

from services.router.domain.alerts.prometheus import rule_file

FILE = Path(__file__).parent / "monitoring" / "alerts.yml"

if __name__ == "__main__":
    FILE.write_text(rule_file())
