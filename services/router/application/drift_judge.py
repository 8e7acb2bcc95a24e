"""Judge drift: add up the replicas' profiles, and compare each closed window with its baseline.

Replicas count values in bins, which this module publishes for them. Only the leader judges and publishes.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from services.router.adapters.drift_files import DriftFiles, VersionKey
from services.router.adapters.drift_metrics import DriftMetrics
from services.router.adapters.registry_cache import RegistryCache
from services.router.application.quality_judge import QualityJudge
from services.router.domain import drift_report
from services.router.domain.drift import Comparison, DriftPolicy
from services.router.domain.drift_history import DriftHistory, WindowLimits
from tidegate.kernel import telemetry
from tidegate.kernel.blobs.store import Blobs
from tidegate.kernel.errors import NotFound, Unavailable
from tidegate.kernel.profiles.piece import ProfilePiece, PublishedBins, Unreadable
from tidegate.kernel.protocol.models import DesiredState
from tidegate.kernel.repeating_task import RepeatingTask
from tidegate.kernel.store import StoreUnavailable
from tidegate.kernel.store.profiles import ProfileStore

log = telemetry.logger(__name__)

TICK_S = 2.0
# All bins are published again after this many seconds, because the store may lose them. Training baselines
# are read at the same interval.
REPEAT_S = 30.0


class DriftJudge:
    """One of the router's loops. It judges the drift of each version."""

    def __init__(
        self,
        store: ProfileStore,
        registry: RegistryCache,
        files: DriftFiles,
        leads: Callable[[], bool],
        limits: WindowLimits,
        policy: DriftPolicy,
        quality: QualityJudge,
        blobs: Blobs,
    ) -> None:
        self._store = store
        self._registry = registry
        self._files = files
        self._leads = leads
        self._limits = limits
        self._policy = policy
        self._quality = quality
        self._blobs = blobs
        self._versions: dict[VersionKey, DriftHistory] = {}
        # For each version: the number of an earlier version of the same model, and the comparison of the two.
        # A comparison is slow, so it is computed only when a window of the version closes.
        self._compared: dict[VersionKey, tuple[int, Comparison]] = {}
        self._repeated_at = float("-inf")
        self._published: dict[str, tuple[str, bool]] = {}
        self._metrics = DriftMetrics()
        self._loop = RepeatingTask("drift", self._step, retry_s=TICK_S)

    def start(self) -> None:
        """Start the loop."""
        self._loop.start()

    async def stop(self) -> None:
        """Stop the loop. If this router leads, also write the histories."""
        await self._loop.stop()
        if self._leads():
            await asyncio.to_thread(self._save, list(self._versions))
        await self._store.close()
        self._blobs.close()

    # --- read by the API --------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """Return the drift of all deployed versions. Raise Unavailable if another router leads."""
        desired = self._desired()
        items = []
        for key in sorted(_deployed(desired)):
            against = self._compared.get(key)
            line = drift_report.summary(*key, self._of(key), self._limits, against[1] if against else None)
            items.append(line | drift_report.places(desired, key))
        return {"items": items}

    def shown(self, name: str) -> dict[str, Any]:
        """Return all drift details of the versions of an endpoint, a Deployment or a model.

        Raise NotFound if nothing has this name, and Unavailable if another router leads.
        """
        desired = self._desired()
        items = []
        for key in self._keys(desired, name):
            against = self._compared.get(key)
            line = drift_report.detail(*key, self._of(key), self._limits, against)
            items.append(line | drift_report.places(desired, key))
        return {"name": name, "items": items}

    def rows(self, name: str) -> AsyncIterator[bytes]:
        """Return the raw rows of the versions of an endpoint, a Deployment or a model, as JSONL.

        Raise NotFound if nothing has this name or no rows are stored. Raise Unavailable if another router
        leads.
        """
        kept = [each.key for key in self._keys(self._desired(), name) for each in self._of(key).kept]
        if not kept:
            raise NotFound(
                f"No raw rows of {name} are kept. Keep rows with `tidegate deploy {name} --version N "
                "--keep-rows 1000`."
            )
        return self._read_rows(kept)

    async def _read_rows(self, keys: Iterable[str]) -> AsyncIterator[bytes]:
        for key in keys:
            with contextlib.suppress(Unavailable):  # the blob was deleted meanwhile, or cannot be read
                yield await self._blobs.get(key)

    async def rebase(self, name: str) -> dict[str, Any]:
        """Replace the baselines of the versions of an endpoint, a Deployment or a model.

        The new baselines are made from rows that are sampled from now on. A version with a training baseline
        keeps its baseline.
        """
        changed = []
        for key in self._keys(self._desired(), name):
            history = self._of(key)
            if history.baseline is None or history.baseline.source == "first_rows":
                history.reset()
                changed.append(key)
        await asyncio.to_thread(self._save, changed)
        return {"name": name, "versions": [{"model": model, "version": number} for model, number in changed]}

    def _desired(self) -> DesiredState:
        if not self._leads():
            raise Unavailable("another router leads and judges drift: retry in a second", retry_after_s=1.0)
        if self._registry.desired is None:
            raise Unavailable(
                self._registry.problem or "the registry has not been read yet", retry_after_s=1.0
            )
        return self._registry.desired

    def _keys(self, desired: DesiredState, name: str) -> list[VersionKey]:
        found = drift_report.versions_of(desired, name)
        if not found:
            raise NotFound(
                f"There is no endpoint, Deployment or deployed model {name!r}. `tidegate models` lists them."
            )
        return found

    # --- the loop ---------------------------------------------------------------------------------------

    async def _step(self) -> float:
        desired = self._registry.desired
        if not self._leads() or desired is None:
            self._versions.clear()
            self._published.clear()
            return TICK_S
        places = {each.name: (each.model, each.version) for each in desired.deployments if each.sampling}
        await self._read_baselines(desired, places.values())
        try:
            taken = await self._store.take(list(places))
        except StoreUnavailable:
            return TICK_S
        for deployment, raws in taken.items():
            pieces = await asyncio.to_thread(_decoded, raws)
            await self._add(deployment, places[deployment], pieces)
        await self._close(set(places.values()))
        await self._drop_rows(desired)
        await self._publish(places, _labelled(desired))
        return TICK_S

    async def _add(self, deployment: str, key: VersionKey, pieces: list[ProfilePiece]) -> None:
        history = self._of(key)
        if history.bins is None:
            before = self._predecessor(key)
            if before is not None and before[1].bins is not None:
                history.use_bins(before[1].bins)
            elif any(piece.bins_id for piece in pieces):
                await self._adopt_bins(deployment, history)
        for piece in pieces:
            history.add(piece)
            if piece.predictions:
                self._quality.add_predictions(key, piece.predictions)

    async def _adopt_bins(self, deployment: str, history: DriftHistory) -> None:
        """Use the bins that the replicas already use, because the router's file with the bins was lost."""
        with contextlib.suppress(StoreUnavailable, Unreadable):
            raw = await self._store.bins(deployment)
            if raw is not None and (found := PublishedBins.from_bytes(raw)).id:
                history.use_bins(found.bins)

    async def _close(self, keys: Iterable[VersionKey]) -> None:
        """Close the windows that are full or old, and judge them.

        A thread judges them, because the bootstrap (random draws) is slow and would block the event loop.
        """
        closed = []
        for key in keys:
            history = self._of(key)
            if await asyncio.to_thread(history.close, time.time(), self._limits, self._policy):
                closed.append(key)
                await self._compare(key, history)
                self._log(key, history)
                if history.last is not None:
                    self._quality.add_window(key, history.last.profile, history.last.end)
        if closed:
            await asyncio.to_thread(self._save, closed)
            self._metrics.show({key: self._of(key).comparison for key in keys})

    async def _drop_rows(self, desired: DesiredState) -> None:
        """Delete expired raw rows. If a version has more rows than its limit, delete its oldest rows too.

        The limit of a version is the largest ``keep_rows`` of its Deployments; 0 if it has no Deployment.
        """
        limits: dict[VersionKey, int] = {}
        for each in desired.deployments:
            key = each.model, each.version
            limits[key] = max(limits.get(key, 0), each.keep_rows)
        for key, history in list(self._versions.items()):
            for blob in history.drop_rows(limits.get(key, 0), time.time()) if history.kept else ():
                await self._blobs.delete(blob)

    def _log(self, key: VersionKey, history: DriftHistory) -> None:
        found = history.comparison
        if found is not None and found.drifted:
            log.warning(
                "a version has drifted",
                extra={"model": key[0], "version": key[1], "columns": found.drifted[: drift_report.WORST]},
            )

    async def _publish(self, places: dict[str, VersionKey], labelled: set[str]) -> None:
        """Publish the bins that changed since the last call, and all bins every ``REPEAT_S`` seconds.

        ``labelled``: the Deployments of endpoints that collect feedback. Only replicas of these Deployments
        send predictions.
        """
        due: dict[str, PublishedBins] = {}
        for deployment, key in places.items():
            history, predictions = self._of(key), deployment in labelled
            known = self._published.get(deployment)
            if (history.bins is not None or predictions) and known != (history.bins_id, predictions):
                due[deployment] = PublishedBins(history.bins_id, history.bins or {}, predictions)
        try:
            await self._store.publish_bins({name: bins.to_bytes() for name, bins in due.items()})
        except StoreUnavailable:
            return
        self._published |= {name: (bins.id, bins.predictions) for name, bins in due.items()}
        if due:
            await asyncio.to_thread(self._save, {places[name] for name in due})

    async def _read_baselines(self, desired: DesiredState, keys: Iterable[VersionKey]) -> None:
        """Read the training baselines every ``REPEAT_S`` seconds, and forget versions that no longer exist.

        The next call of :meth:`_publish` then publishes all bins again.
        """
        if time.monotonic() - self._repeated_at < REPEAT_S:
            return
        self._repeated_at = time.monotonic()
        self._published.clear()
        for key in set(keys):
            try:
                self._of(key).use_training(await self._registry.baseline(*key))
            except Unavailable as error:
                log.info(
                    "a baseline could not be read; the router tries again", extra={"problem": error.message}
                )
        existing = {(each.model, each.number) for each in desired.versions}
        self._versions = {key: each for key, each in self._versions.items() if key in existing}
        await asyncio.to_thread(self._files.keep_only, existing)

    # --- versions ---------------------------------------------------------------------------------------

    def _of(self, key: VersionKey) -> DriftHistory:
        history = self._versions.get(key)
        if history is None:
            history = self._versions[key] = self._loaded(key)
        return history

    def _loaded(self, key: VersionKey) -> DriftHistory:
        document = self._files.read(key)
        if document is not None:
            try:
                return DriftHistory.from_json(document, self._policy)
            except (ValueError, KeyError, TypeError) as error:
                log.warning("a drift history cannot be read", extra={"version": key, "problem": str(error)})
        return DriftHistory()

    def _save(self, keys: Iterable[VersionKey]) -> None:
        for key in keys:
            if (history := self._versions.get(key)) is not None:
                self._files.write(key, history.to_json())

    def _predecessor(self, key: VersionKey) -> tuple[int, DriftHistory] | None:
        """Return the model's newest earlier version that has bins: its number and its drift history."""
        desired = self._registry.desired
        if desired is None:
            return None
        earlier = sorted(
            (each.number for each in desired.versions if each.model == key[0] and each.number < key[1]),
            reverse=True,
        )
        for number in earlier:
            history = self._of((key[0], number))
            if history.bins is not None:
                return number, history
        return None

    async def _compare(self, key: VersionKey, history: DriftHistory) -> None:
        """Compare the version's last window with the last window of an earlier version."""
        self._compared.pop(key, None)
        if (found := self._predecessor(key)) is not None:
            comparison = await asyncio.to_thread(history.against, found[1], self._policy)
            if comparison is not None:
                self._compared[key] = found[0], comparison


def _labelled(desired: DesiredState) -> set[str]:
    """Return the Deployments of endpoints that collect feedback."""
    return {
        name
        for endpoint in desired.endpoints
        if endpoint.collects_feedback
        for name in drift_report.deployments_of(endpoint)
    }


def _deployed(desired: DesiredState) -> set[VersionKey]:
    return {(each.model, each.version) for each in desired.deployments}


def _decoded(raws: Iterable[bytes]) -> list[ProfilePiece]:
    found = []
    for raw in raws:
        try:
            found.append(ProfilePiece.from_bytes(raw))
        except Unreadable as error:
            log.warning("a profile cannot be read", extra={"problem": str(error)})
    return found
