"""Check that a trusted key has signed an artifact.

The registry keeps the cryptographic signatures, but a worker trusts only the keys on its own host. So a
manipulated registry, or a caller with the scope publish, cannot make a worker load a model without a trusted
signature.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx

from tidegate.kernel.errors import BadRequest, ModelFailed, Unavailable
from tidegate.kernel.http.certificates import trusted
from tidegate.kernel.protocol.model_signature import MAX_BUNDLE_BYTES

TIMEOUT = httpx.Timeout(30.0, connect=5.0)
TRIES, PAUSE_S = 5, 1.0
# The largest answer that the worker reads when it fetches an artifact's signatures, in bytes.
MAX_ANSWER_BYTES = 16 * MAX_BUNDLE_BYTES


async def check(registry_url: str, token: str, artifact: Path, sha256: str, keys: Path) -> str:
    """Return the id of the trusted key that has signed an artifact.

    ``keys``: the file or folder with the trusted keys. Raise ModelFailed if none of them has signed the
    artifact, and Unavailable if the registry does not answer.
    """
    # This import takes time, and most workers have no trusted keys. So it is not at the top of the file.
    from tidegate.kernel.signing import BadKey, BadSignature, TrustedKeys

    try:
        found = await asyncio.to_thread(TrustedKeys.read, keys)
        bundles = await _bundles(f"{registry_url.rstrip('/')}/v1/artifacts/{sha256}/signatures", token)
        return await asyncio.to_thread(found.check, bundles, artifact, sha256)
    except BadKey as error:
        raise ModelFailed(f"The trusted keys cannot be read (TIDEGATE_TRUSTED_KEYS): {error}") from None
    except (BadSignature, BadRequest) as error:
        raise ModelFailed(
            f"This worker loads only signed models, and the artifact {sha256[:12]} is not accepted: "
            f"{error}. Sign the model and add the signature: tidegate signatures NAME --add model.sig. Then "
            "verify the version again: tidegate verify NAME"
        ) from None


async def _bundles(url: str, token: str) -> list[Any]:
    headers = {"Authorization": f"Bearer {token}"}
    async with httpx.AsyncClient(
        timeout=TIMEOUT, headers=headers, trust_env=False, verify=trusted(url)
    ) as client:
        for attempt in range(1, TRIES + 1):
            try:
                answer = await client.get(url)
                if answer.status_code == 200 and len(answer.content) <= MAX_ANSWER_BYTES:
                    return [each["bundle"] for each in answer.json()["items"]]
                problem = f"the registry answered {answer.status_code}"
            except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
                problem = str(error) or type(error).__name__
            if attempt < TRIES:
                await asyncio.sleep(PAUSE_S)
    raise Unavailable(f"The signatures of the artifact cannot be fetched: {problem}")
