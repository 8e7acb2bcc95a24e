"""Verify JWT bearer tokens with the public keys of their issuer (a JWKS, from a file or a URL)."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import httpx
import jwt
import orjson

from services.gateway.domain.jwt_claims import principal_of
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.errors import Unauthorized, Unavailable
from tidegate.kernel.protocol.access import Principal
from tidegate.kernel.protocol.caller_limits import CallerLimits

log = telemetry.logger(__name__)

REFRESH_S = 300.0
# The seconds between two reads of the keys while there are no keys. A token with an unknown key also causes a
# read, but only if the last read is more than this many seconds ago.
RETRY_S = 5.0
TIMEOUT_S = 5.0
LEEWAY_S = 30
# The seconds for which a verified token is accepted without a new check. A token that expires earlier is
# accepted for a shorter time.
TRUST_S = 300.0
# The most characters of a token. There is a limit because thousands of verified tokens stay in memory.
LONGEST = 8192
_TOKEN = re.compile(rb"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
# The accepted algorithms sign with a private key. A token that is signed with a shared secret, or not
# signed ("none"), is rejected.
_ALGORITHMS = {
    "RSA": ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512"],
    "EC": ["ES256", "ES384", "ES512"],
    "OKP": ["EdDSA"],
}


class Jwks:
    """A verifier of tokens. It reads the issuer's keys in the background, so no request waits for them."""

    def __init__(
        self,
        url: str,
        *,
        issuer: str,
        audience: str,
        roles_claim: str,
        scopes_of: Mapping[str, Sequence[str]],
        limits: Mapping[str, CallerLimits] | None = None,
        on_verified: Callable[[Principal], None] = lambda principal: None,
    ) -> None:
        """``url``: the http(s) URL or the file path of the JWKS. ``scopes_of``: the scopes of each role.

        ``limits``: the limits by role. If there are any, ``on_verified`` is called with each principal whose
        token was verified.
        """
        self._url = url
        self._issuer = issuer
        self._audience = audience
        self._roles_claim = roles_claim
        self._scopes_of = scopes_of
        self._limits = limits or {}
        self._on_verified = on_verified
        self._keys: dict[str, jwt.PyJWK] | None = None
        self._read_at = float("-inf")
        self._refresh_requested = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read the keys once, then keep them up to date in the background."""
        await self._refresh()
        self._task = asyncio.create_task(self._run(), name="jwks")

    async def stop(self) -> None:
        """Stop reading."""
        await tasks.end(self._task)

    def verify(self, token: bytes) -> tuple[Principal, float]:
        """Return a token's principal, and the time until which the token is accepted (Unix time in ms).

        Raises Unauthorized, or Unavailable while no keys are known.
        """
        if self._keys is None:
            raise Unavailable(
                "the keys of the token issuer are not known yet: TIDEGATE_JWKS_URL has not been read",
                reason="not_known_yet",
                retry_after_s=1,
            )
        # The decoder ignores invalid characters, so one token could be written as many different texts. Each
        # text would fill an entry in the cache of verified tokens. So reject every text with invalid
        # characters here.
        if len(token) > LONGEST or _TOKEN.fullmatch(token) is None:
            raise Unauthorized(f"the token is invalid: expected a JWT of at most {LONGEST} characters")
        try:
            key = self._keys.get(jwt.get_unverified_header(token).get("kid", ""))
            if key is None:
                self._request_refresh()
                raise Unauthorized("the token is signed by a key that is not in the issuer's JWKS")
            claims = jwt.decode(
                token,
                key,
                algorithms=_algorithms(key),
                audience=self._audience,
                issuer=self._issuer,
                leeway=LEEWAY_S,
                options={"require": ["exp", "sub", "iss", "aud"]},
            )
        except jwt.PyJWTError as error:
            raise Unauthorized(f"the token is invalid: {error}") from None
        if not claims["sub"]:
            raise Unauthorized("the token is invalid: its claim 'sub' is empty")
        # `exp` stays an integer, because it can be too large for a float.
        until = min(int(claims["exp"]) + LEEWAY_S, time.time() + TRUST_S)
        principal = principal_of(claims, self._roles_claim, self._scopes_of, self._limits)
        if self._limits:
            self._on_verified(principal)
        return principal, until * 1e3

    def _request_refresh(self) -> None:
        if time.monotonic() - self._read_at > RETRY_S:
            self._refresh_requested.set()

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REFRESH_S if self._keys else RETRY_S):
                    await self._refresh_requested.wait()
            self._refresh_requested.clear()
            await self._refresh()

    async def _refresh(self) -> None:
        self._read_at = time.monotonic()
        try:
            self._keys = _usable(orjson.loads(await self._read()))
        except (httpx.HTTPError, OSError, ValueError, KeyError, TypeError) as error:
            log.warning(
                "the JWKS could not be read; the last valid JWKS stays in use",
                extra={"problem": str(error)[:200]},
            )

    async def _read(self) -> bytes:
        if not self._url.startswith(("http://", "https://")):
            return await asyncio.to_thread(Path(self._url.removeprefix("file://")).read_bytes)
        # Each read makes a new client, so that changed certificate authorities are loaded.
        verify = not self._url.startswith("http://")
        async with httpx.AsyncClient(timeout=TIMEOUT_S, verify=verify) as http:
            return (await http.get(self._url)).raise_for_status().content


def _usable(document: dict[str, list[dict[str, str]]]) -> dict[str, jwt.PyJWK]:
    """Return the keys that can verify tokens, each under its id."""
    keys = {}
    for fields in document["keys"]:
        if fields.get("kty") not in _ALGORITHMS or fields.get("use", "sig") != "sig":
            continue
        with contextlib.suppress(jwt.PyJWTError):
            keys[str(fields.get("kid", ""))] = jwt.PyJWK(fields)
    return keys


def _algorithms(key: jwt.PyJWK) -> list[str]:
    allowed = _ALGORITHMS[key.key_type or ""]
    return [key.algorithm_name] if key.algorithm_name in allowed else []
