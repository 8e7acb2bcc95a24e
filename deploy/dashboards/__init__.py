"""Grafana's dashboards, written in Python. ``python -m deploy.dashboards`` creates their JSON files."""
