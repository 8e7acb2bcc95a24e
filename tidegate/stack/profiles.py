"""The stack's profile ``edge``: the settings that differ on a small machine. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from tidegate.kernel.settings.base import Settings

EDGE = "edge"
DAY_S = 86_400

# The settings for a machine with one core and 1 GB of RAM. They lower memory limits and lengthen intervals. A
# job waits up to a week for its model or upstream, and a webhook is tried again for up to a week. This is
# because the network may be down for days.
_EDGE = {
    "MONITORING": "off",
    "GATEWAY_WORKERS": 1,
    "HTTP_CONNECTIONS": 1024,
    "HTTP_CONNECTIONS_PER_PEER": 512,
    "HTTP_PENDING_HEAD_BYTES": 8 * 2**20,
    "MAX_BODY_BYTES": 32 * 2**20,
    "MAX_JSON_BYTES": 8 * 2**20,
    "MAX_INFLIGHT_BYTES": 64 * 2**20,
    "MAX_GRPC_CONNECTIONS": 256,
    "MAX_FETCHED_BYTES": 64 * 2**20,
    "CACHE_MIN_FREE_BYTES": 256 * 2**20,
    "JOBS_KEPT_BYTES": 64 * 2**20,
    "MAX_WAITING_JOBS": 100_000,
    "DEAD_LETTER_BYTES": 128 * 2**20,
    "ACCESS_LOG_MB": 16,
    "WORKER_LOG_MB": 64,
    "AUTOSCALER_PERIOD_S": 1.0,
    "AUTOSCALER_STARTS_AT_ONCE": 1,
    "AUTOSCALER_HISTORY_MB": 32,
    "WATCH_INTERVAL_S": 15.0,
    "QUALITY_PREDICTIONS": 5_000,
    "UPSTREAM_WAIT_S": 7.0 * DAY_S,
    "JOB_TTL_S": 7.0 * DAY_S,
    "JOB_RETENTION_S": 7.0 * DAY_S,
    "WEBHOOK_GIVE_UP_S": 7.0 * DAY_S,
    "WEBHOOK_LONGEST_RETRY_S": 300.0,
}
# Limit glibc's malloc to one arena. Each further arena would keep memory that the process has freed.
_PROCESS = {"MALLOC_ARENA_MAX": "1"}


def defaults(settings: Settings, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the names and values of the profile's settings. Leave out settings that the user has set."""
    if settings.profile != EDGE:
        return {}
    given = {name for name, value in (*environ.items(), *settings.file_values.items()) if value}
    found = {f"TIDEGATE_{name}": str(value) for name, value in _EDGE.items()}
    return {name: value for name, value in found.items() if name not in given}


def process_environment(settings: Settings, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the profile's variables that are not settings, such as the one for malloc.

    Leave out variables that the user has set.
    """
    if settings.profile != EDGE:
        return {}
    return {name: value for name, value in _PROCESS.items() if not environ.get(name)}


def together(settings: Settings) -> bool:
    """Return True if registry, router and autoscaler share one process."""
    return settings.profile == EDGE
