"""Grafana's dashboards as values. ``python -m deploy.dashboards`` writes them to ``deploy/grafana``."""
