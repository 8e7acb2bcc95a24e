"""Tidegate: trained models behind a dependable API, with a message queue in between."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["AsyncClient", "Client", "__version__"]

if TYPE_CHECKING:
    from tidegate.client import AsyncClient, Client


def __getattr__(name: str) -> Any:
    # The SDK is imported on first use: the services import this package too and need no HTTP client.
    if name in {"Client", "AsyncClient"}:
        from tidegate import client

        return getattr(client, name)
    raise AttributeError(f"module 'tidegate' has no attribute {name!r}")
