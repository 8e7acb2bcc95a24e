"""Let the blocking and the asyncio client share calls. Each call is written once, as a flow."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any, Concatenate, Generic, ParamSpec, overload

from tidegate.client.flow import Flow, T

P = ParamSpec("P")


class Blocking:
    """The base of a client with calls that block until they return their result."""

    @abstractmethod
    def _run(self, flow: Flow[T]) -> T: ...


class Awaited:
    """The base of a client with calls that must be awaited."""

    @abstractmethod
    async def _run(self, flow: Flow[T]) -> T: ...


class Call(Generic[P, T]):
    """A decorator for a method that returns a flow.

    On a :class:`Blocking` object, the method runs the flow and returns its result. On an :class:`Awaited`
    object, the method is a coroutine function with the same parameters.
    """

    def __init__(self, method: Callable[Concatenate[Any, P], Flow[T]]) -> None:
        # Let ``help()`` show the type of the result instead of the flow's type.
        types = method.__annotations__
        types["return"] = types["return"].removeprefix("Flow[").removesuffix("]")

        @wraps(method)
        def blocking(client: Any, /, *args: P.args, **named: P.kwargs) -> T:
            result: T = client._run(method(client, *args, **named))
            return result

        @wraps(method)
        async def awaited(client: Any, /, *args: P.args, **named: P.kwargs) -> T:
            result: T = await client._run(method(client, *args, **named))
            return result

        self._blocking, self._awaited = blocking, awaited

    @overload
    def __get__(self, client: Blocking, owner: type) -> Callable[P, T]: ...

    @overload
    def __get__(self, client: Awaited, owner: type) -> Callable[P, Coroutine[Any, Any, T]]: ...

    @overload
    def __get__(self, client: None, owner: type) -> Callable[..., Any]: ...

    def __get__(self, client: object, owner: type) -> Callable[..., Any]:
        chosen: Any = self._awaited if issubclass(owner, Awaited) else self._blocking
        bound: Callable[..., Any] = chosen.__get__(client, owner)
        return bound
