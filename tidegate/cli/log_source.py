"""Read logs from the state folder on this machine, or from the autoscaler of another stack."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tidegate.cli.api import Control, control, part
from tidegate.kernel.errors import NotFound, TidegateError
from tidegate.kernel.log_files import LogFolder
from tidegate.kernel.settings.base import Settings

Line = dict[str, Any]


class Source(Protocol):
    """The interface of a source of logs."""

    def read(self, name: str, *, since: float, until: float, lines: int) -> list[Line]:
        """Return the last lines of the logs of ``name``, the oldest first.

        Raise NotFound for an unknown name. The error suggests similar names.
        """

    def of_request(self, id_: str) -> list[Line]:
        """Return the log lines of a request or job, the oldest first."""


class Local:
    """The logs in the state folder. They can also be read while the stack is down."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._folder = LogFolder(settings.state_path / "log")

    def file(self, name: str) -> Path | None:
        """Return the path of a service's log file; None if the service has none."""
        path = self._folder.path / f"{name}.log"
        return path if path.parent == self._folder.path and path.is_file() else None

    def read(self, name: str, *, since: float, until: float, lines: int) -> list[Line]:
        """See :class:`Source`."""
        try:
            logs = self._folder.find(name)
        except NotFound:
            targets, endpoints = self._endpoint(name)
            logs = self._folder.find(name, targets, endpoints)
        return [each.shown() for each in self._folder.read(logs, since=since, until=until, lines=lines)]

    def of_request(self, id_: str) -> list[Line]:
        """See :class:`Source`."""
        return [each.shown() for each in self._folder.of_request(id_)]

    def _endpoint(self, name: str) -> tuple[list[str], list[str]]:
        """Return the names of an Endpoint's Deployments, and the names of all Endpoints.

        If the registry does not answer, return two empty lists.
        """
        try:
            found = Control(self._settings).registry.pages("/v1/endpoints")
        except TidegateError:
            return [], []
        targets = [t["deployment"] for each in found if each["name"] == name for t in each["targets"]]
        return targets, [each["name"] for each in found]


class Remote:
    """Logs that are read through the autoscaler's API."""

    def __init__(self, plane: Control) -> None:
        self._autoscaler = plane.autoscaler

    def read(self, name: str, *, since: float, until: float, lines: int) -> list[Line]:
        """See :class:`Source`."""
        path = f"/v1/logs/{part(name)}"
        found: Sequence[Line] = self._autoscaler.items(path, since=since, until=until, lines=lines)
        return list(found)

    def of_request(self, id_: str) -> list[Line]:
        """See :class:`Source`."""
        return self._autoscaler.items(f"/v1/requests/{part(id_)}/logs")


def source(settings: Settings) -> Source:
    """Return the source of logs for the stack of these settings. Raise Unreachable if there is no stack."""
    if not settings.api_key and (settings.state_path / "log").is_dir():
        return Local(settings)
    return Remote(control())
