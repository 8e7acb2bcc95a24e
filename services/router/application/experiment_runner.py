"""Count the outcomes of every experiment, and end the experiments that are complete.

Only the leader counts the outcomes. One write to its file stores both the counts and the position in the
stream of feedback. So each outcome is counted exactly once, even after a crash. Feedback that arrives while
no router runs is counted later.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from services.router.adapters import shared_file
from services.router.adapters.registry_cache import RegistryCache
from services.router.application.leadership import Leadership
from services.router.domain import experiment_report
from services.router.domain.experiment_watch import ExperimentWatch
from tidegate.kernel import telemetry
from tidegate.kernel.protocol.experiments import Experiment
from tidegate.kernel.protocol.models import Endpoint
from tidegate.kernel.repeating_task import RepeatingTask
from tidegate.kernel.store import Store, StoreUnavailable
from tidegate.kernel.store.feedback import START, FeedbackStore

log = telemetry.logger(__name__)

TICK_S = 1.0
# Shortest time between two writes of the file, in seconds. A crash loses no count: the file also holds the
# position in the stream of feedback, and the next router continues there.
SAVE_S = 2.0
PAGE = 1000


class ExperimentRunner:
    """One of the router's loops. :attr:`watches` holds the counts of each endpoint's last experiment."""

    def __init__(
        self,
        store: Store,
        feedback: FeedbackStore,
        registry: RegistryCache,
        leadership: Leadership,
        disk: Path,
        wake: Callable[[], None],
    ) -> None:
        """``wake`` makes the controller read the registry immediately."""
        self._store = store
        self._feedback = feedback
        self._registry = registry
        self._leadership = leadership
        self._disk = disk
        self._wake = wake
        self._loop = RepeatingTask("experiments", self._step, retry_s=TICK_S)
        self._led = False
        self._position = START
        self._changed = False
        self._saved_at = 0.0
        self.watches: dict[str, ExperimentWatch] = {}

    def start(self) -> None:
        """Start the loop."""
        self._loop.start()

    async def stop(self) -> None:
        """Stop the loop."""
        await self._loop.stop()
        if self._led and self._changed:
            self._save()

    def report(self, endpoint: Endpoint) -> dict[str, Any]:
        """Return the report of an endpoint's experiment, for JSON."""
        experiment = endpoint.experiment
        if experiment is None:
            return {"endpoint": endpoint.name, "experiment": None}
        if not self._leadership.leads:
            self._load()
        watch = self.watches.get(endpoint.name)
        if watch is None or watch.id != experiment.id:
            watch = ExperimentWatch(experiment.id)
        return experiment_report.report(endpoint.name, experiment, watch)

    async def _step(self) -> float:
        if not self._leadership.leads:
            self._led = False
            return TICK_S
        if not self._led:
            self._load()
            self._led = True
        experiments = self._experiments()
        if self._registry.desired is None:
            return TICK_S  # wait for the list of experiments, or feedback would be skipped
        with contextlib.suppress(StoreUnavailable):
            self._changed |= await self._take_feedback(experiments)
            self._changed |= await self._count(experiments)
            if self._changed and time.monotonic() - self._saved_at >= SAVE_S:
                self._save()
            for name, experiment in experiments.items():
                await self._end_if_complete(name, experiment)
        return TICK_S

    def _experiments(self) -> dict[str, Experiment]:
        """Return each endpoint's last experiment, even if it has ended: late feedback still counts."""
        desired = self._registry.desired
        endpoints = desired.endpoints if desired is not None else []
        return {each.name: each.experiment for each in endpoints if each.experiment is not None}

    async def _take_feedback(self, experiments: dict[str, Experiment]) -> bool:
        """Count the feedback up to the end of the stream. Return True if the position moved."""
        changed = False
        if await self._feedback.lost(self._position):
            log.warning("feedback was removed before the router read it", extra={"after": self._position})
            for watch in self.watches.values():
                watch.late = True
        while records := await self._feedback.read(self._position, PAGE):
            for position, record in records:
                experiment = experiments.get(record.endpoint)
                if experiment is not None and record.experiment == experiment.id:
                    self._watch(record.endpoint, experiment).take(experiment, record)
                elif record.experiment and self._registry.problem is not None:
                    return changed  # the registry does not answer, but may know this experiment: wait
                self._position, changed = position, True
            if len(records) < PAGE:
                break
        return changed

    async def _count(self, experiments: dict[str, Experiment]) -> bool:
        """Add the gateways' counts to running experiments. Return True if a count changed."""
        running = {name: each for name, each in experiments.items() if each.active}
        if not running:
            return False
        view, now = await self._store.gateways(), time.time()
        changed = False
        for name, experiment in running.items():
            watch = self._watch(name, experiment)
            if not watch.begun:
                watch.begin(name, view.reports)
                changed = True
            changed |= watch.count(name, view.reports)
            if watch.due(now):
                watch.note(experiment_report.point_of(experiment, watch, now))
        return changed

    async def _end_if_complete(self, name: str, experiment: Experiment) -> None:
        if not experiment.active:
            return
        reason = experiment_report.complete(experiment, self._watch(name, experiment), time.time())
        if reason and await self._registry.complete(name, experiment.id, reason):
            log.info("experiment complete", extra={"endpoint": name, "why": reason})
            self._wake()

    def _watch(self, endpoint: str, experiment: Experiment) -> ExperimentWatch:
        watch = self.watches.get(endpoint)
        if watch is None or watch.id != experiment.id:
            watch = self.watches[endpoint] = ExperimentWatch(experiment.id)
        return watch

    def _load(self) -> None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            document = orjson.loads(self._disk.read_bytes())
            watches = {name: ExperimentWatch.from_json(each) for name, each in document["watches"].items()}
            self._position, self.watches = document["position"], watches

    def _save(self) -> None:
        existing = self._experiments()
        self.watches = {name: watch for name, watch in self.watches.items() if name in existing}
        watches = {name: watch.to_json() for name, watch in self.watches.items()}
        self._changed, self._saved_at = False, time.monotonic()
        try:
            shared_file.replace(self._disk, orjson.dumps({"position": self._position, "watches": watches}))
        except OSError as error:  # a full disk must not stop the counting
            log.warning(
                "the counts of experiments could not be written to their file",
                extra={"problem": str(error)},
            )
