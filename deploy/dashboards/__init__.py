"""Grafana's dashboards as plain values. ``python -m deploy.dashboards`` writes them to ``deploy/grafana``."""
