"""Parse the log lines of services and replicas, and find the logs of a service, Deployment or Endpoint.

This module is pure. ``tidegate.kernel.log_files`` reads the files.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import orjson

# The names of the fields that can contain the id of a request or job.
ID_FIELDS = ("request_id", "request", "job", "client_id", "trace_id", "id")
# The fields that link log lines. A search for an id first finds the lines with this id. It then reads the ids
# in these fields of the found lines, and also finds all lines with those ids.
_LINKED = ("request_id", "job")
NEAR = 5

_FILE = re.compile(r"(?:worker-)?(?P<log>.+)\.log(?:\.\d+)?")
_REPLICA = re.compile(r"(?P<deployment>.+)-\d+-\d+")
_SPAN = re.compile(r"(?:(\d+(?:\.\d+)?)d)?(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")
_SECONDS = (86_400, 3600, 60, 1)


class LogEntry(NamedTuple):
    """A line of a log. ``at``: seconds since the epoch. ``log``: the service or replica that wrote it."""

    at: float
    log: str
    fields: dict[str, Any]

    def shown(self) -> dict[str, Any]:
        """Return the line as a JSON object, with ``log`` first."""
        return {"log": self.log} | self.fields


def log_of(file: str) -> str:
    """Return the service or replica that writes a log file of this name; empty if the file is no log.

    The name of a rotated log ends with a number.
    """
    found = _FILE.fullmatch(file)
    return found["log"] if found else ""


def parse(text: str, log: str, before: float) -> LogEntry:
    """Return a line as an entry.

    ``before``: the time of the previous line. A line without a time gets this time.
    """
    try:
        fields = orjson.loads(text)
    except orjson.JSONDecodeError:
        fields = None
    if not isinstance(fields, dict):
        return LogEntry(before, log, {"message": text})
    return LogEntry(time_of(fields, before), log, fields)


def time_of(fields: Mapping[str, Any], otherwise: float) -> float:
    """Return when a line was written, in seconds since the epoch.

    Return ``otherwise`` for a line without a time.
    """
    try:
        return datetime.fromisoformat(str(fields["time"])).timestamp()
    except (KeyError, ValueError):
        return otherwise


def deployment_of(replica: str) -> str:
    """Return the Deployment in a replica's name ``<deployment>-<slot>-<generation>``.

    Return an empty string if the name is not a replica's name.
    """
    found = _REPLICA.fullmatch(replica)
    return found["deployment"] if found else ""


def meant(name: str, logs: Iterable[str], targets: Sequence[str] = ()) -> list[str]:
    """Return the names of the logs that ``name`` means.

    If ``name`` is a service or replica with a log, return only this log. Otherwise return the logs of all
    replicas of these Deployments: ``name``, ``name-v<n>`` and ``targets``.
    """
    known = list(logs)
    if name in known:
        return [name]
    version = re.compile(re.escape(name) + r"(-v\d+)?")
    wanted = {*targets}
    return [each for each in known if (of := deployment_of(each)) in wanted or version.fullmatch(of)]


def near(name: str, logs: Iterable[str], others: Iterable[str] = ()) -> list[str]:
    """Return the names of services, replicas, Deployments and Endpoints that are most similar to ``name``."""
    known = set(others)
    for log in logs:
        deployment = deployment_of(log)
        known |= {log, deployment, re.sub(r"-v\d+$", "", deployment)} - {""}
    return difflib.get_close_matches(name, sorted(known), NEAR, 0.6)


def since(text: str, now: float) -> float:
    """Return the time that a text states, in seconds since the epoch.

    The text is an ISO time, or a duration before ``now`` such as ``10m``, ``1h30m`` or ``2d``. Raises
    ValueError for any other text.
    """
    found = _SPAN.fullmatch(text.strip())
    if found is not None and any(found.groups()):
        return now - sum(float(part or 0) * size for part, size in zip(found.groups(), _SECONDS, strict=True))
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise ValueError(
            f"{text!r} is not a time: use a span such as 30s, 10m, 2h or 1d, or an ISO time such as "
            "2026-01-31T10:00"
        ) from None


def ids_in(fields: Mapping[str, Any]) -> set[str]:
    """Return the ids of requests and jobs in a line."""
    several = fields.get("request_ids")
    found = {str(fields[name]) for name in ID_FIELDS if fields.get(name)}
    return found | (set(map(str, several)) if isinstance(several, list) else set())


def linked(entries: Iterable[LogEntry]) -> set[str]:
    """Return the ids of the requests and jobs to which these lines belong."""
    return {str(each.fields[name]) for each in entries for name in _LINKED if each.fields.get(name)}


def as_written(id_: str) -> bytes:
    """Return an id in quotes, as log lines contain it, to search for it in the bytes of a log.

    A short id without quotes would match most lines.
    """
    return orjson.dumps(id_)
