"""Start and end a process in less time. Main modules call :func:`begin` before their other imports."""

from __future__ import annotations

import atexit
import gc
import sys

# Collect no garbage until this many new objects exist. A service makes fewer objects while it loads. A
# command that runs for hours makes more objects, so its garbage is still collected.
LOADING = 300_000
# Thresholds of the garbage collector for a running service. The first two make most collections small and
# quick. The third makes full collections rare, because a full collection visits all objects. Each open
# connection has 17 objects, and a visit to 100,000 objects takes 60 ms. Full collections are still needed: a
# reference cycle that was in use during two earlier collections is freed only by a full one.
RUNNING = (10_000, 3, 60)


def begin() -> None:
    """Skip garbage collection while the process loads and when it exits.

    A collection would free almost nothing, because loaded modules stay in memory until the process ends.
    Without collections, a command needs a quarter less CPU time, and a service loads in a fifth less time.
    """
    gc.set_threshold(LOADING, *gc.get_threshold()[1:])
    atexit.register(gc.freeze)
    # `import httpx` also imports httpx's command line, with pygments, if click and rich are installed. httpx
    # has no option to prevent this. The next line makes the import of the command line raise an ImportError,
    # which httpx handles.
    sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]
    # If OpenTelemetry's SDK is installed, redis imports the SDK's metrics, which import psutil. Tidegate
    # needs the SDK only for traces, because its metrics are Prometheus metrics. So prevent this import.
    sys.modules.setdefault("opentelemetry.sdk.metrics", None)  # type: ignore[arg-type]


def loaded() -> None:
    """Exclude present objects from garbage collection. Set the thresholds of a running service.

    A full collection would visit every module, model class and route, and delay all requests by some 40 ms.
    Inference requests make no reference cycles, so they need no collection. This function does not collect
    garbage first. A collection takes 60 ms and would free only 1,200 of 150,000 objects.
    """
    gc.freeze()
    gc.set_threshold(*RUNNING)
