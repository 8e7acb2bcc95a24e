"""Build the drift judge and the quality judge."""

from __future__ import annotations

from collections.abc import Callable

from services.router.adapters.drift_files import DriftFiles
from services.router.adapters.quality_file import QualityFile
from services.router.adapters.registry_cache import RegistryCache
from services.router.application.drift_judge import DriftJudge
from services.router.application.quality_judge import QualityJudge
from services.router.settings import RouterSettings
from tidegate.kernel.blobs.store import Blobs
from tidegate.kernel.store.feedback import FeedbackStore
from tidegate.kernel.store.profiles import ProfileStore


def judges_of(
    settings: RouterSettings, registry: RegistryCache, leads: Callable[[], bool]
) -> tuple[DriftJudge, QualityJudge]:
    """Build the judges, but do not start them. The drift judge passes predictions to the quality judge."""
    data = settings.state_path / "data"
    quality = QualityJudge(
        FeedbackStore.connect(settings.jobs_url),
        registry,
        QualityFile(data / "quality"),
        leads,
        settings.quality_limits(),
    )
    drift = DriftJudge(
        ProfileStore.connect(settings.redis_url),
        registry,
        DriftFiles(data / "drift"),
        leads,
        settings.drift_windows(),
        settings.drift_policy(),
        quality,
        Blobs(settings.blob_url),
    )
    return drift, quality
