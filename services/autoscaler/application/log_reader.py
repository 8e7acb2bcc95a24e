"""Read the logs of all replicas of a Deployment, and merge them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from services.autoscaler.domain.launcher import Launcher
from tidegate.kernel.errors import NotFound, Unavailable
from tidegate.kernel.log_files import LogFolder
from tidegate.kernel.protocol import log_lines
from tidegate.kernel.protocol.log_lines import LogEntry
from tidegate.kernel.protocol.models import DesiredState

Line = dict[str, Any]


class LogReader:
    """A reader of log files, and of the output of running replicas.

    Log files are in the log folder. The launcher returns the output of running replicas.

    ``desired_state`` returns the desired state that was read last. ``replicas`` returns the names of the
    running replicas.
    """

    def __init__(
        self,
        folder: LogFolder,
        launcher: Launcher,
        desired_state: Callable[[], DesiredState | None],
        replicas: Callable[[], Sequence[str]],
    ) -> None:
        self._folder = folder
        self._launcher = launcher
        self._desired_state = desired_state
        self._replicas = replicas

    async def read(self, name: str, *, since: float, until: float, lines: int, services: bool) -> list[Line]:
        """Return the last lines of a replica, Deployment or Endpoint, in order of time.

        ``services``: True if the caller may read logs of services, too. Raise ``NotFound`` if no log and no
        running replica fits the name.
        """
        running = list(self._replicas())
        targets, endpoints = self._endpoint(name)
        here = set(log_lines.meant(name, running, targets))
        try:
            written = await asyncio.to_thread(self._folder.find, name, targets, endpoints)
        except NotFound:
            if not here:
                raise
            written = []
        written = [log for log in written if services or log_lines.deployment_of(log)]
        if not written and not here:
            raise NotFound(f"There is no log of a Deployment or replica {name!r}.")
        found = await asyncio.to_thread(self._folder.read, written, since=since, until=until, lines=lines)
        for replica in sorted(here - set(written)):
            found += await self._of_running(replica, since, until, lines)
        found.sort(key=lambda each: each.at)
        return [each.shown() for each in found[-lines:]]

    async def of_request(self, id_: str) -> list[Line]:
        """Return the lines about a request or job, in order of time."""
        found = await asyncio.to_thread(self._folder.of_request, id_)
        ids = {id_} | log_lines.linked(found)
        known = set(self._folder.names())
        for replica in self._replicas():
            if replica not in known:
                lines = await self._of_running(replica, -1.0, float("inf"), 10_000)
                found += [each for each in lines if not ids.isdisjoint(log_lines.ids_in(each.fields))]
        return [each.shown() for each in sorted(found, key=lambda each: each.at)]

    async def _of_running(self, replica: str, since: float, until: float, lines: int) -> list[LogEntry]:
        try:
            text = await self._launcher.output(replica, lines)
        except Unavailable:
            return []
        before, found = 0.0, []
        for line in text.splitlines():
            entry = log_lines.parse(line, replica, before)
            before = entry.at
            if since < entry.at <= until:
                found.append(entry)
        return found

    def _endpoint(self, name: str) -> tuple[list[str], list[str]]:
        """Return the Deployments of an Endpoint, and the names of all Endpoints."""
        known = self._desired_state()
        if known is None:
            return [], []
        targets = [t.deployment for each in known.endpoints if each.name == name for t in each.targets]
        return targets, [each.name for each in known.endpoints]
