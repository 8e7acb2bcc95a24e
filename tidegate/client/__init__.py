"""The Python SDK: numpy in, numpy out."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tidegate.client.aio import AsyncBatchHandle, AsyncClient, AsyncJobHandle
    from tidegate.client.batches import BatchItem
    from tidegate.client.result import InferResult
    from tidegate.client.sync import BatchHandle, Client, JobHandle

__all__ = [
    "AsyncBatchHandle",
    "AsyncClient",
    "AsyncJobHandle",
    "BatchHandle",
    "BatchItem",
    "Client",
    "InferResult",
    "JobHandle",
]


def __getattr__(name: str) -> Any:
    # Imported on first use: the command line imports only the errors from here, and does not need numpy.
    if name in {"Client", "JobHandle", "BatchHandle"}:
        from tidegate.client import sync

        return getattr(sync, name)
    if name in {"AsyncClient", "AsyncJobHandle", "AsyncBatchHandle"}:
        from tidegate.client import aio

        return getattr(aio, name)
    if name == "BatchItem":
        from tidegate.client.batches import BatchItem

        return BatchItem
    if name == "InferResult":
        from tidegate.client.result import InferResult

        return InferResult
    raise AttributeError(f"module 'tidegate.client' has no attribute {name!r}")
