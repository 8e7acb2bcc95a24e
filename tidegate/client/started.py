"""Record the settings of a stack's last start, so that commands in other shells can reach the stack.

The record is in ``<state>/run/started.json``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tidegate.kernel.settings.base import SOURCES, Settings, is_secret

# The settings that a command needs to reach the stack.
ADDRESS = (
    "host",
    "gateway_port",
    "gateway_grpc_port",
    "registry_port",
    "router_port",
    "autoscaler_port",
    "tls_cert",
    "tls_key",
    "tls_ca",
)
# Variables that are not recorded, because they only say where the stack is.
_PLACES = {
    "TIDEGATE_STATE_DIR",
    "TIDEGATE_RUNTIME_DIR",
    "TIDEGATE_CONFIG_DIR",
    "TIDEGATE_CONTEXT",
    "TIDEGATE_STACK",
    SOURCES,
}


@dataclass(frozen=True, slots=True)
class Started:
    """The settings with which `up` started a stack.

    ``address``: the settings that a command needs to reach the stack. It has only settings that differ from
    their defaults. ``environment``: the ``TIDEGATE_*`` variables of `up`, without secrets.
    """

    address: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


def of(settings: Settings, environ: Mapping[str, str]) -> Started:
    """Return the record of a start with these settings."""
    defaults = type(settings).model_fields
    address = {
        name: str(getattr(settings, name))
        for name in ADDRESS
        if getattr(settings, name) not in (None, defaults[name].default)
    }
    given = {
        name: value
        for name, value in environ.items()
        if name.startswith("TIDEGATE_") and value and name not in _PLACES and not is_secret(name, value)
    }
    return Started(address, given)


def write(state: Path, started: Started) -> None:
    """Write the record of a start to its file."""
    path = state / "run" / "started.json"
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.write_text(json.dumps(asdict(started), indent=1))
    fresh.replace(path)


def read(state: Path) -> Started:
    """Return the record of the last start. Return an empty one if it is missing or unreadable."""
    try:
        found = json.loads((state / "run" / "started.json").read_text())
        return Started(dict(found["address"]), dict(found["environment"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Started()


def forgotten(before: Started, environ: Mapping[str, str], kept: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that the last start had and that are missing now.

    They are neither in ``environ`` nor in ``kept``, the settings in the stack's settings file.
    """
    return {
        name: value
        for name, value in before.environment.items()
        if not environ.get(name) and name not in kept
    }
