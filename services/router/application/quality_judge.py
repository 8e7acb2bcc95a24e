"""Join feedback with sampled predictions, and measure each version's quality. Only the leader does so."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Any

from services.router.adapters.drift_files import VersionKey
from services.router.adapters.drift_metrics import QualityMetrics
from services.router.adapters.quality_file import QualityFile
from services.router.adapters.registry_cache import RegistryCache
from services.router.domain import quality_report
from services.router.domain.drift_report import places, versions_of
from services.router.domain.quality_estimate import estimate
from services.router.domain.quality_history import QualityHistory, QualityLimits
from tidegate.kernel import telemetry
from tidegate.kernel.errors import NotFound, Unavailable
from tidegate.kernel.profiles.piece import SampledPrediction
from tidegate.kernel.profiles.profile import Profile
from tidegate.kernel.protocol.feedback import FeedbackRecord
from tidegate.kernel.protocol.models import DesiredState
from tidegate.kernel.repeating_task import RepeatingTask
from tidegate.kernel.store import StoreUnavailable
from tidegate.kernel.store.feedback import START, FeedbackStore

log = telemetry.logger(__name__)

TICK_S = 2.0
READ = 5000
PREDICTIONS_S = 60.0
# Feedback with one of these metrics is the label of a prediction.
TRUTHS = ("label", "truth", "actual", "target")


class QualityJudge:
    """One of the router's loops. It measures the quality of each version."""

    def __init__(
        self,
        store: FeedbackStore,
        registry: RegistryCache,
        file: QualityFile,
        leads: Callable[[], bool],
        limits: QualityLimits,
    ) -> None:
        self._store = store
        self._registry = registry
        self._file = file
        self._leads = leads
        self._limits = limits
        self._histories: dict[VersionKey, QualityHistory] = {}
        self._position: str | None = None
        self._changed = False
        self._predictions_at = 0.0
        self._metrics = QualityMetrics()
        self._loop = RepeatingTask("quality", self._step, retry_s=TICK_S)

    def start(self) -> None:
        """Start the loop."""
        self._loop.start()

    async def stop(self) -> None:
        """Stop the loop. If this router leads, also write the histories."""
        await self._loop.stop()
        if self._leads() and self._position is not None:
            await self._save(predictions=True)
        await self._store.close()

    # --- called by the drift judge ----------------------------------------------------------------------

    def add_predictions(self, key: VersionKey, predictions: Iterable[SampledPrediction]) -> None:
        """Keep sampled predictions until their labels arrive."""
        self._of(key).add_predictions(predictions, time.time(), self._limits)

    def add_window(self, key: VersionKey, window: Profile, at: float) -> None:
        """Estimate a version's quality in a closed window of samples, and store the estimate."""
        history = self._of(key)
        if (found := estimate(window, history.all)) is not None:
            history.add_estimate(found, at)
            self._changed = True

    # --- read by the API --------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """Return the quality of all deployed versions. Raise Unavailable if another router leads."""
        desired = self._desired()
        deployed = {(each.model, each.version) for each in desired.deployments}
        return {"items": [self._summary(key) | places(desired, key) for key in sorted(deployed)]}

    def shown(self, name: str) -> dict[str, Any]:
        """Return the quality of the versions of an endpoint, a Deployment or a model.

        Raise NotFound if nothing has this name, and Unavailable if another router leads.
        """
        desired = self._desired()
        keys = versions_of(desired, name)
        if not keys:
            raise NotFound(
                f"There is no endpoint, Deployment or deployed model {name!r}. `tidegate models` lists them."
            )
        items = [
            quality_report.detail(*key, self._of(key), self._limits) | places(desired, key) for key in keys
        ]
        return {"name": name, "items": items}

    def _summary(self, key: VersionKey) -> dict[str, Any]:
        return quality_report.summary(*key, self._of(key), self._limits)

    def _desired(self) -> DesiredState:
        if not self._leads():
            raise Unavailable("another router leads and judges quality: retry in a second", retry_after_s=1.0)
        if self._registry.desired is None:
            raise Unavailable(
                self._registry.problem or "the registry has not been read yet", retry_after_s=1.0
            )
        return self._registry.desired

    # --- the loop ---------------------------------------------------------------------------------------

    async def _step(self) -> float:
        desired = self._registry.desired
        if not self._leads() or desired is None:
            self._histories.clear()
            self._position = None
            return TICK_S
        if self._position is None:
            self._load()
        assert self._position is not None
        places = {each.name: (each.model, each.version) for each in desired.deployments}
        try:
            if await self._store.lost(self._position):
                log.warning("feedback was removed from the stream before the router read it")
            records = await self._store.read(self._position, READ)
        except StoreUnavailable:
            return TICK_S
        now = time.time()
        for position, record in records:
            self._add(places, record, now)
            self._position = position
        self._close(now, existing={(each.model, each.number) for each in desired.versions})
        if records or self._changed:
            await self._save(predictions=now - self._predictions_at >= PREDICTIONS_S)
        return 0.0 if len(records) == READ else TICK_S

    def _add(self, places: dict[str, VersionKey], record: FeedbackRecord, now: float) -> None:
        truth = record.label if record.label is not None else record.value
        key = places.get(record.deployment)
        if record.metric in TRUTHS and truth is not None and key is not None:
            self._of(key).add_label(record.request_id, str(truth), now)

    def _close(self, now: float, existing: set[VersionKey]) -> None:
        for key in list(self._histories):
            if key not in existing:
                del self._histories[key]
                continue
            history = self._histories[key]
            history.forget_early(now)
            if history.close(now, self._limits):
                self._changed = True
                self._log(key, history)
        if self._changed:
            self._metrics.show(self._histories)

    def _log(self, key: VersionKey, history: QualityHistory) -> None:
        if history.state == "dropped":
            extra = {"model": key[0], "version": key[1], "measures": history.points[-1].measures}
            log.warning("the quality of a version has dropped", extra=extra)

    def _of(self, key: VersionKey) -> QualityHistory:
        return self._histories.setdefault(key, QualityHistory())

    def _load(self) -> None:
        found, waiting = self._file.read()
        known, self._histories = self._histories, {}
        self._position = START
        try:
            for name, each in (found or {"histories": {}})["histories"].items():
                self._histories[_key(name)] = QualityHistory.from_json(each)
            for name, predictions in waiting.items():
                self.add_predictions(_key(name), [SampledPrediction(*each) for each in predictions])
            self._position = found["position"] if found else START
        except (KeyError, ValueError, TypeError) as error:
            log.warning("the quality histories cannot be read", extra={"problem": repr(error)})
        for key, history in known.items():  # predictions that arrived before the file was read
            self.add_predictions(key, history.waiting.values())

    async def _save(self, *, predictions: bool) -> None:
        histories = {f"{key[0]}@{key[1]}": each.to_json() for key, each in self._histories.items()}
        document = {"position": self._position, "histories": histories}
        self._changed = not await asyncio.to_thread(self._file.write, document)
        if predictions:
            self._predictions_at = time.time()
            waiting = {
                f"{key[0]}@{key[1]}": [tuple(one) for one in each.waiting.values()]
                for key, each in self._histories.items()
                if each.waiting
            }
            await asyncio.to_thread(self._file.write_predictions, waiting)


def _key(name: str) -> VersionKey:
    model, _, number = name.rpartition("@")
    return model, int(number)
