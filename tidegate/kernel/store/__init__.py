"""Access to Valkey or Redis. In the kernel, only this package imports the library redis.

:mod:`~tidegate.kernel.store.live` stores live facts, such as heartbeats. If they are lost, services
  write them again.
:mod:`~tidegate.kernel.store.jobs` stores the jobs, which must not be lost.
"""

from tidegate.kernel.store.connection import StoreUnavailable
from tidegate.kernel.store.jobs import JobStore
from tidegate.kernel.store.live import Store

__all__ = ["JobStore", "Store", "StoreUnavailable"]
