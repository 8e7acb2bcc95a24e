"""Which images the stack is built on and runs: what is stated, else official ones, or stand-ins for them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

OFFICIAL = {
    "TIDEGATE_PYTHON_IMAGE": "python:3.11-slim-bookworm",
    "TIDEGATE_RABBITMQ_IMAGE": "rabbitmq:4-management",
    "TIDEGATE_VALKEY_IMAGE": "valkey/valkey:8",
    "TIDEGATE_POSTGRES_IMAGE": "postgres:17",
    "TIDEGATE_PROMETHEUS_IMAGE": "prom/prometheus:v3.5.0",
}
"""As compose.yaml has them, by the variable that names another one."""

STAND_INS = {
    "TIDEGATE_PYTHON_IMAGE": "standin/python:3.11-slim",
    "TIDEGATE_RABBITMQ_IMAGE": "standin/rabbitmq:4-management",
    "TIDEGATE_VALKEY_IMAGE": "standin/valkey:8",
    "TIDEGATE_POSTGRES_IMAGE": "standin/postgres:17",
    "TIDEGATE_PROMETHEUS_IMAGE": "standin/prometheus:2",
}
"""Images of a machine that can fetch none: used when the engine has them and lacks the official ones."""


def stand_ins(environ: Mapping[str, str], have: Collection[str]) -> dict[str, str]:
    """The variables to set, given what is set already and the images that the engine has."""
    return {
        variable: image
        for variable, image in STAND_INS.items()
        if not environ.get(variable) and OFFICIAL[variable] not in have and image in have
    }


def absent(environ: Mapping[str, str], have: Collection[str]) -> list[str]:
    """The images that would have to be fetched."""
    chosen = {**OFFICIAL, **stand_ins(environ, have)}
    wanted = [environ.get(variable) or image for variable, image in chosen.items()]
    return [image for image in wanted if image not in have]
