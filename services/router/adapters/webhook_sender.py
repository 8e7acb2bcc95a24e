"""Send webhooks over HTTP, and only to allowed addresses. Redirects are not followed."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from typing import Any

import httpcore
import httpx

from services.router.domain.webhooks import WebhookAttempt
from tidegate.kernel import telemetry
from tidegate.kernel.protocol.webhooks import WebhookTarget, is_public
from tidegate.version import VERSION

log = telemetry.logger(__name__)

KEEPALIVE_S = 5.0
# At most this many addresses of a host name are tried. Each gets an equal part of the connect timeout.
MAX_ADDRESSES = 4
# At most this many bytes of a response's body are read: only the status and a header are used.
MAX_BODY_BYTES = 64 * 1024
MAX_PROBLEM_LENGTH = 200


class AddressRefused(httpcore.ConnectError):
    """The receiver has no address to which webhooks may be sent."""


class GuardedNetwork(httpcore.AsyncNetworkBackend):
    """A network backend of httpcore that resolves names itself, and connects only to allowed addresses.

    Each attempt in flight has its own thread for name resolution. So a name server that does not answer
    delays no other webhook.
    """

    def __init__(self, *, allow_private: bool, threads: int, connect_s: float) -> None:
        self._allow_private = allow_private
        self._connect_s = connect_s
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="webhook-names")
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect to the first address that answers, within ``connect_s`` for all addresses together.

        Raise :class:`AddressRefused` if no address is allowed, ConnectError if none answers. ``timeout`` is
        ignored.
        """
        addresses = await self._resolve(host, port)
        allowed = [each for each in addresses if self._allow_private or is_public(ip_address(each))]
        if not allowed:
            # Callers can read the error that is raised below. So only the log contains addresses of this
            # network.
            log.info(
                "the address of a webhook is refused",
                extra={"host": host, "addresses": addresses[:MAX_ADDRESSES]},
            )
            raise AddressRefused("the address is not allowed: webhooks go to public addresses only")
        problem: Exception | None = None
        share_s = self._connect_s / min(len(allowed), MAX_ADDRESSES)
        for address in allowed[:MAX_ADDRESSES]:
            try:
                return await self._network.connect_tcp(address, port, share_s, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                problem = error
        if problem is not None:
            log.info("a webhook's receiver cannot be reached", extra={"host": host, "problem": str(problem)})
        raise httpcore.ConnectError("the receiver cannot be reached")

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> httpcore.AsyncNetworkStream:
        """Raise AddressRefused, because webhooks go only to hosts."""
        raise AddressRefused("webhooks cannot be sent to Unix sockets")

    async def sleep(self, seconds: float) -> None:
        """Sleep. httpcore's interface requires this method."""
        await asyncio.sleep(seconds)

    def close(self) -> None:
        """Stop the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _resolve(self, host: str, port: int) -> list[str]:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._threads, _addresses, host, port)
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError("the host name of the receiver cannot be resolved") from error


def _addresses(host: str, port: int) -> list[str]:
    entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    # Remove the scope, which is ``%eth0`` in ``fe80::1%eth0``, because it is not part of the address.
    return list(dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in entries))


class WebhookSender:
    """An HTTP client that sends webhooks.

    At most ``max_in_flight`` attempts run at the same time, each for at most ``timeout_s``.
    """

    def __init__(self, *, allow_private: bool, timeout_s: float, max_in_flight: int) -> None:
        self._timeout_s = timeout_s
        self._network = GuardedNetwork(
            allow_private=allow_private, threads=max_in_flight, connect_s=timeout_s
        )
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=httpx.create_ssl_context(),
            max_connections=max_in_flight,
            max_keepalive_connections=max_in_flight,
            keepalive_expiry=KEEPALIVE_S,
            network_backend=self._network,
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._pool.aclose()
        self._network.close()

    async def post(self, target: WebhookTarget, body: bytes, headers: Mapping[str, str]) -> WebhookAttempt:
        """Send a webhook once. Return errors in the result instead of raising them."""
        began = time.perf_counter()
        status: int | None = None
        problem, retry_after = "", None
        try:
            async with asyncio.timeout(self._timeout_s):
                status, retry_after = await self._exchange(target, body, headers)
        except TimeoutError:
            problem = f"no answer within {self._timeout_s:g} s"
        except Exception as error:  # any error of the HTTP client is a failed attempt
            problem = str(error) or type(error).__name__
        took_ms = (time.perf_counter() - began) * 1e3
        return WebhookAttempt(status, problem[:MAX_PROBLEM_LENGTH], took_ms, retry_after)

    async def _exchange(
        self, target: WebhookTarget, body: bytes, headers: Mapping[str, str]
    ) -> tuple[int, float | None]:
        url = httpcore.URL(
            scheme=target.scheme, host=target.host, port=target.port, target=target.path.encode()
        )
        all_headers = {
            "Host": target.authority,
            "User-Agent": f"tidegate/{VERSION}",
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **headers,
        }
        async with self._pool.stream(
            "POST", url, headers=list(all_headers.items()), content=body
        ) as response:
            read = 0
            async for chunk in response.aiter_stream():
                read += len(chunk)
                if read > MAX_BODY_BYTES:
                    break
        retry_after = dict(response.headers).get(b"retry-after", b"")
        return response.status, float(retry_after) if retry_after.isdigit() else None
