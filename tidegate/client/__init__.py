"""The Python SDK: numpy in, numpy out."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tidegate.client.aio import AsyncClient
    from tidegate.client.result import InferResult
    from tidegate.client.sync import Client

__all__ = ["AsyncClient", "Client", "InferResult"]


def __getattr__(name: str) -> Any:
    # On first use: the command line takes the errors from here and does without numpy.
    if name == "Client":
        from tidegate.client.sync import Client

        return Client
    if name == "AsyncClient":
        from tidegate.client.aio import AsyncClient

        return AsyncClient
    if name == "InferResult":
        from tidegate.client.result import InferResult

        return InferResult
    raise AttributeError(f"module 'tidegate.client' has no attribute {name!r}")
