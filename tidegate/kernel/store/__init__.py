"""Valkey or Redis: the only importers of redis are here.

:mod:`~tidegate.kernel.store.live` has the live facts, which may vanish.
:mod:`~tidegate.kernel.store.jobs` has the jobs, which may not.
"""

from tidegate.kernel.store.connection import StoreUnavailable
from tidegate.kernel.store.jobs import JobStore
from tidegate.kernel.store.live import Store

__all__ = ["JobStore", "Store", "StoreUnavailable"]
