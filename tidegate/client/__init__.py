"""The Python SDK: numpy in, numpy out."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tidegate.client.aio import AsyncBatchHandle, AsyncClient, AsyncJobHandle
    from tidegate.client.batches import BatchItem
    from tidegate.client.llm import ChatChunk, ChatResult, Embeddings, Usage
    from tidegate.client.llm_aio import AsyncChatStream
    from tidegate.client.llm_sync import ChatStream
    from tidegate.client.result import InferResult
    from tidegate.client.sync import BatchHandle, Client, JobHandle

__all__ = [
    "AsyncBatchHandle",
    "AsyncChatStream",
    "AsyncClient",
    "AsyncJobHandle",
    "BatchHandle",
    "BatchItem",
    "ChatChunk",
    "ChatResult",
    "ChatStream",
    "Client",
    "Embeddings",
    "InferResult",
    "JobHandle",
    "Usage",
]


def __getattr__(name: str) -> Any:
    # Import these names on first use. Their modules need numpy, and the command line needs only the errors.
    if name in {"Client", "JobHandle", "BatchHandle"}:
        from tidegate.client import sync

        return getattr(sync, name)
    if name in {"AsyncClient", "AsyncJobHandle", "AsyncBatchHandle"}:
        from tidegate.client import aio

        return getattr(aio, name)
    if name in {"ChatChunk", "ChatResult", "Embeddings", "Usage"}:
        from tidegate.client import llm

        return getattr(llm, name)
    if name == "ChatStream":
        from tidegate.client.llm_sync import ChatStream

        return ChatStream
    if name == "AsyncChatStream":
        from tidegate.client.llm_aio import AsyncChatStream

        return AsyncChatStream
    if name == "BatchItem":
        from tidegate.client.batches import BatchItem

        return BatchItem
    if name == "InferResult":
        from tidegate.client.result import InferResult

        return InferResult
    raise AttributeError(f"module 'tidegate.client' has no attribute {name!r}")
