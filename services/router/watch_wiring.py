"""Build the parts that watch the endpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from services.router.adapters.registry_cache import RegistryCache
from services.router.adapters.watch_file import WatchFile
from services.router.application.dead_letters import DeadLetters
from services.router.application.endpoint_watch import EndpointWatch
from services.router.settings import RouterSettings
from tidegate.kernel.store import Store


def watch_of(
    settings: RouterSettings,
    store: Store,
    registry: RegistryCache,
    leads: Callable[[], bool],
    letters: DeadLetters,
) -> EndpointWatch:
    """Return the watch, not started."""

    def dead() -> Iterator[tuple[float, str]]:
        return ((letter.at, letter.deployment) for letter in letters.all)

    return EndpointWatch(
        store,
        registry,
        leads,
        WatchFile(settings.state_path / "data" / "watch.db"),
        dead,
        every_s=settings.watch_interval_s,
        day_s=settings.watch_day_s,
    )
