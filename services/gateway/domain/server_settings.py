"""Show Tidegate's trace and log settings in Triton's form. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tidegate.kernel.errors import BadRequest

# For each of Triton's log settings, the log levels of Tidegate at which it is on.
_LEVELS = {"log_info": {"DEBUG", "INFO"}, "log_warning": {"DEBUG", "INFO", "WARNING"}}

LOG_REMEDY = "an operator changes the log level with `tidegate settings set TIDEGATE_LOG_LEVEL=DEBUG`"
TRACE_REMEDY = "an operator must start the stack with OTEL_EXPORTER_OTLP_ENDPOINT and OTEL_TRACES_SAMPLER_ARG"


def log_settings(level: str) -> dict[str, Any]:
    """Return the log settings of a gateway with this level."""
    return {
        "log_file": "",
        **{name: level in levels for name, levels in _LEVELS.items()},
        "log_error": True,
        "log_verbose_level": int(level == "DEBUG"),
        "log_format": "default",
    }


def trace_settings(*, on: bool) -> dict[str, Any]:
    """Return the trace settings. ``on``: True if the gateway exports traces."""
    return {
        "trace_level": ["TIMESTAMPS"] if on else ["OFF"],
        "trace_rate": "1000",
        "trace_count": "-1",
        "log_frequency": "0",
        "trace_file": "",
        "trace_mode": "opentelemetry",
    }


def check_update(present: Mapping[str, Any], given: Mapping[str, Any], remedy: str) -> None:
    """Raise BadRequest if an update would change a setting. Accept an update without changes."""
    for name, value in given.items():
        if name not in present:
            raise BadRequest(f"Unknown setting {name[:80]!r}: the settings are {', '.join(sorted(present))}")
        if value != present[name]:
            raise BadRequest(f"{name!r} cannot be changed over this API: {remedy}")
