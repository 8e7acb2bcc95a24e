"""Choose each image of the stack: the configured image, otherwise the official image or a stand-in.

A stand-in replaces an official image on a machine that cannot pull images. It is chosen if the container
engine has the stand-in but not the official image.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

OFFICIAL = {
    "TIDEGATE_PYTHON_IMAGE": "python:3.11-slim-bookworm",
    "TIDEGATE_RABBITMQ_IMAGE": "rabbitmq:4-management",
    "TIDEGATE_VALKEY_IMAGE": "valkey/valkey:8",
    "TIDEGATE_POSTGRES_IMAGE": "postgres:17",
    "TIDEGATE_PROMETHEUS_IMAGE": "prom/prometheus:v3.5.0",
}
"""The images of compose.yaml, by the variable that replaces each."""

STAND_INS = {
    "TIDEGATE_PYTHON_IMAGE": "standin/python:3.11-slim",
    "TIDEGATE_RABBITMQ_IMAGE": "standin/rabbitmq:4-management",
    "TIDEGATE_VALKEY_IMAGE": "standin/valkey:8",
    "TIDEGATE_POSTGRES_IMAGE": "standin/postgres:17",
    "TIDEGATE_PROMETHEUS_IMAGE": "standin/prometheus:2",
}
"""Images for a machine that cannot pull: used if the engine has them and not the official ones."""


def stand_ins(environ: Mapping[str, str], have: Collection[str]) -> dict[str, str]:
    """Return the environment variables that select stand-ins, each with its image.

    ``have``: the images that the container engine has.
    """
    return {
        variable: image
        for variable, image in STAND_INS.items()
        if not environ.get(variable) and OFFICIAL[variable] not in have and image in have
    }


def absent(environ: Mapping[str, str], have: Collection[str]) -> list[str]:
    """Return the images that the stack needs and the container engine does not have."""
    chosen = {**OFFICIAL, **stand_ins(environ, have)}
    needed = [environ.get(variable) or image for variable, image in chosen.items()]
    return [image for image in needed if image not in have]
