"""JWT bearer tokens, checked against the keys of whoever issues them (JWKS, from a file or a URL)."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx
import jwt
import orjson

from services.gateway.domain.jwt_claims import principal_of
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.errors import Unauthorized, Unavailable
from tidegate.kernel.protocol.access import Principal

log = telemetry.logger(__name__)

REFRESH_S = 300.0
# A token by a key that is not known lets the keys be read again, but not more often than this.
AGAIN_S = 5.0
TIMEOUT_S = 5.0
LEEWAY_S = 30
# How long a token is taken without being looked at again.
TRUST_S = 300.0
# Tokens that were found good are remembered, thousands of them.
LONGEST = 8192
_TOKEN = re.compile(rb"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
# Signatures that only the issuer can make: never a shared secret, never none.
_ALGORITHMS = {
    "RSA": ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512"],
    "EC": ["ES256", "ES384", "ES512"],
    "OKP": ["EdDSA"],
}


class Jwks:
    """Verifies tokens in memory; the keys are read in the background."""

    def __init__(
        self,
        url: str,
        *,
        issuer: str,
        audience: str,
        roles_claim: str,
        scopes_of: Mapping[str, Sequence[str]],
    ) -> None:
        """``url``: http(s), or the path of a file."""
        self._url = url
        self._issuer = issuer
        self._audience = audience
        self._roles_claim = roles_claim
        self._scopes_of = scopes_of
        self._keys: dict[str, jwt.PyJWK] | None = None
        self._read_at = float("-inf")
        self._again = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read the keys once, then go on in the background."""
        await self._refresh()
        self._task = asyncio.create_task(self._run(), name="jwks")

    async def stop(self) -> None:
        """Stop reading."""
        await tasks.end(self._task)

    def verify(self, token: bytes) -> tuple[Principal, float]:
        """Who bears a token, and until when that may be believed (ms since the epoch).

        Raises Unauthorized, or Unavailable while no keys are known.
        """
        if self._keys is None:
            raise Unavailable(
                "the keys that tokens are checked by are not known yet",
                reason="not_known_yet",
                retry_after_s=1,
            )
        # The decoder ignores other characters, so that one token would have any number of spellings.
        if len(token) > LONGEST or _TOKEN.fullmatch(token) is None:
            raise Unauthorized(f"the token is invalid: expected a JWT of at most {LONGEST} characters")
        try:
            key = self._keys.get(jwt.get_unverified_header(token).get("kid", ""))
            if key is None:
                self._ask_again()
                raise Unauthorized("the token is signed by a key that is not known")
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
            raise Unauthorized("the token is invalid: its sub is empty")
        # As whole numbers: one that no float can hold is far away, too.
        until = min(int(claims["exp"]) + LEEWAY_S, time.time() + TRUST_S)
        return principal_of(claims, self._roles_claim, self._scopes_of), until * 1e3

    def _ask_again(self) -> None:
        if time.monotonic() - self._read_at > AGAIN_S:
            self._again.set()

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REFRESH_S if self._keys else AGAIN_S):
                    await self._again.wait()
            self._again.clear()
            await self._refresh()

    async def _refresh(self) -> None:
        self._read_at = time.monotonic()
        try:
            self._keys = _usable(orjson.loads(await self._read()))
        except (httpx.HTTPError, OSError, ValueError, KeyError, TypeError) as error:
            log.warning("the JWKS is not read; the last good one stays", extra={"problem": str(error)[:200]})

    async def _read(self) -> bytes:
        if not self._url.startswith(("http://", "https://")):
            return await asyncio.to_thread(Path(self._url.removeprefix("file://")).read_bytes)
        # Read anew each time: the authority of an issuer of our own may have been renewed in its file.
        verify = not self._url.startswith("http://")
        async with httpx.AsyncClient(timeout=TIMEOUT_S, verify=verify) as http:
            return (await http.get(self._url)).raise_for_status().content


def _usable(document: dict[str, list[dict[str, str]]]) -> dict[str, jwt.PyJWK]:
    """The keys by their ids: public ones, for signatures."""
    found = {}
    for fields in document["keys"]:
        if fields.get("kty") not in _ALGORITHMS or fields.get("use", "sig") != "sig":
            continue
        with contextlib.suppress(jwt.PyJWTError):
            found[str(fields.get("kid", ""))] = jwt.PyJWK(fields)
    return found


def _algorithms(key: jwt.PyJWK) -> list[str]:
    fitting = _ALGORITHMS[key.key_type or ""]
    return [key.algorithm_name] if key.algorithm_name in fitting else []
