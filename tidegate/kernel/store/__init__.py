"""Access to Valkey or Redis. In the kernel, only this package imports the library redis.

:mod:`~tidegate.kernel.store.live` holds the live facts. After a loss, services write them again.
:mod:`~tidegate.kernel.store.jobs` holds the jobs, which must not be lost.
"""

from tidegate.kernel.store.connection import StoreUnavailable
from tidegate.kernel.store.jobs import JobStore
from tidegate.kernel.store.live import Store

__all__ = ["JobStore", "Store", "StoreUnavailable"]
