"""Sends webhooks over HTTP. Redirects are not followed; addresses are judged when a connection is made."""

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
from tidegate.kernel.protocol.webhooks import Target, is_public
from tidegate.version import VERSION

log = telemetry.logger(__name__)

KEPT_IDLE_S = 5.0
# Of a name with many addresses so many are tried, each for its share of the time.
ADDRESSES = 4
# More of an answer than this is not read: only its status counts.
READ_BYTES = 64 * 1024
PROBLEM_LENGTH = 200


class AddressRefused(httpcore.ConnectError):
    """Every address of the receiver's is one that webhooks may not reach."""


class GuardedNetwork(httpcore.AsyncNetworkBackend):
    """Resolves a name itself and connects to the very address that it has judged.

    Names are resolved in threads of its own, one for each delivery that may be under way: a name server
    that does not answer holds up nobody else.
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
        """Connect to the first address that answers; raises :class:`AddressRefused` when none may be asked.

        ``timeout`` is not heeded: all addresses together have ``connect_s``.
        """
        found = await self._resolve(host, port)
        allowed = [each for each in found if self._allow_private or is_public(ip_address(each))]
        if not allowed:
            # The caller reads this: what a name resolves to in here is not told.
            log.info("a webhook's address is refused", extra={"host": host, "addresses": found[:ADDRESSES]})
            raise AddressRefused("the address is not allowed: webhooks go to public addresses only")
        problem: Exception | None = None
        share_s = self._connect_s / min(len(allowed), ADDRESSES)
        for address in allowed[:ADDRESSES]:
            try:
                return await self._network.connect_tcp(address, port, share_s, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                problem = error
        if problem is not None:
            log.info("a webhook's receiver is not reached", extra={"host": host, "problem": str(problem)})
        raise httpcore.ConnectError("the receiver cannot be reached")

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> httpcore.AsyncNetworkStream:
        """Never: a webhook goes to a host."""
        raise AddressRefused("a webhook does not go to a socket of this machine")

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await asyncio.sleep(seconds)

    def close(self) -> None:
        """Let the threads go."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _resolve(self, host: str, port: int) -> list[str]:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(self._threads, _addresses, host, port)
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError("the receiver's name cannot be resolved") from error
        return found


def _addresses(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    # A scope (fe80::1%eth0) is no part of the address.
    return list(dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in found))


class WebhookSender:
    """Posts to receivers, ``at_once`` at most; a try ends after ``timeout_s`` whatever the receiver does."""

    def __init__(self, *, allow_private: bool, timeout_s: float, at_once: int) -> None:
        self._timeout_s = timeout_s
        self._network = GuardedNetwork(allow_private=allow_private, threads=at_once, connect_s=timeout_s)
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=httpx.create_ssl_context(),
            max_connections=at_once,
            max_keepalive_connections=at_once,
            keepalive_expiry=KEPT_IDLE_S,
            network_backend=self._network,
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._pool.aclose()
        self._network.close()

    async def post(self, target: Target, body: bytes, headers: Mapping[str, str]) -> WebhookAttempt:
        """One try; what goes wrong is in what it gives."""
        began = time.perf_counter()
        status: int | None = None
        problem, retry_after = "", None
        try:
            async with asyncio.timeout(self._timeout_s):
                status, retry_after = await self._exchange(target, body, headers)
        except TimeoutError:
            problem = f"no answer within {self._timeout_s:g} s"
        except Exception as error:  # whatever a receiver made the client raise, it is this try's outcome
            problem = str(error) or type(error).__name__
        took_ms = (time.perf_counter() - began) * 1e3
        return WebhookAttempt(status, problem[:PROBLEM_LENGTH], took_ms, retry_after)

    async def _exchange(
        self, target: Target, body: bytes, headers: Mapping[str, str]
    ) -> tuple[int, float | None]:
        url = httpcore.URL(
            scheme=target.scheme, host=target.host, port=target.port, target=target.path.encode()
        )
        sent = {
            "Host": target.authority,
            "User-Agent": f"tidegate/{VERSION}",
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **headers,
        }
        async with self._pool.stream("POST", url, headers=list(sent.items()), content=body) as answer:
            read = 0
            async for chunk in answer.aiter_stream():
                read += len(chunk)
                if read > READ_BYTES:
                    break
        asked = dict(answer.headers).get(b"retry-after", b"")
        return answer.status, float(asked) if asked.isdigit() else None
