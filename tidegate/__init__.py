"""Serve trained models through a dependable API. A message queue connects the API and the models."""

from typing import TYPE_CHECKING, Any

from tidegate.version import VERSION

if TYPE_CHECKING:
    from tidegate.client import (
        AsyncBatchHandle,
        AsyncChatStream,
        AsyncClient,
        AsyncJobHandle,
        BatchHandle,
        BatchItem,
        ChatChunk,
        ChatResult,
        ChatStream,
        Client,
        Embeddings,
        InferResult,
        JobHandle,
        Usage,
    )
    from tidegate.client.errors import BadAnswer, Unreachable
    from tidegate.kernel.errors import (
        BadRequest,
        ColdStart,
        Conflict,
        DeadlinePassed,
        Forbidden,
        MethodNotAllowed,
        ModelFailed,
        NoCapacity,
        NoRoutes,
        NotFound,
        Overloaded,
        PayloadTooLarge,
        PreconditionFailed,
        SequenceLost,
        TidegateError,
        Unauthorized,
        Unavailable,
    )
    from tidegate.kernel.errors import TooMany as TooManyRequests
    from tidegate.model import Tensor, batched

__version__ = VERSION

__all__ = [
    "__version__",
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
    "Tensor",
    "batched",
    "BadAnswer",
    "BadRequest",
    "ColdStart",
    "Conflict",
    "DeadlinePassed",
    "Forbidden",
    "MethodNotAllowed",
    "ModelFailed",
    "NoCapacity",
    "NoRoutes",
    "NotFound",
    "Overloaded",
    "PayloadTooLarge",
    "PreconditionFailed",
    "SequenceLost",
    "TidegateError",
    "TooManyRequests",
    "Unauthorized",
    "Unavailable",
    "Unreachable",
]

_CLIENT = frozenset(__all__[1 : __all__.index("Usage") + 1])
_CLIENT_ERRORS = {"BadAnswer", "Unreachable"}
_MODEL = {"Tensor", "batched"}


def __getattr__(name: str) -> Any:
    # Import each name on its first use. The services import this package too, and they must not load the HTTP
    # client.
    if name in _CLIENT:
        from tidegate import client

        return getattr(client, name)
    if name in _CLIENT_ERRORS:
        from tidegate.client import errors as client_errors

        return getattr(client_errors, name)
    if name in _MODEL:
        from tidegate import model

        return getattr(model, name)
    if name in __all__:
        from tidegate.kernel import errors

        return getattr(errors, "TooMany" if name == "TooManyRequests" else name)
    raise AttributeError(f"module 'tidegate' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
