"""Valkey or Redis: the only importers of redis are here.

:mod:`tidegate.store.live` has the live facts, which may vanish; :mod:`tidegate.store.jobs` has the jobs,
which may not.
"""

from tidegate.store.connection import StoreUnavailable
from tidegate.store.jobs import JobStore
from tidegate.store.live import Store

__all__ = ["JobStore", "Store", "StoreUnavailable"]
