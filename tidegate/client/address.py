"""Find the gateway and the key for the SDK. The command line uses the same gateway and key."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidegate.client import http
from tidegate.kernel.errors import BadRequest


@dataclass(frozen=True, slots=True)
class Address:
    """The gateway's address. If ``key`` is empty, the caller is anonymous.

    ``cert`` and ``ca`` are paths of certificate files, see :mod:`tidegate.kernel.http.certificates`.
    """

    url: str
    key: str = ""
    cert: str | None = None
    ca: str | None = None

    def options(self) -> dict[str, Any]:
        """Return the arguments of ``httpx.Client``. Raise ValueError for an invalid URL."""
        return http.options(self.url, self.key, cert=self.cert, ca=self.ca)


def find(url: str | None, key: str | None, environ: Mapping[str, str] = os.environ) -> Address:
    """Return the gateway to call, and the key to send to it.

    The gateway is ``url`` if it is given, else TIDEGATE_GATEWAY_URL, else the gateway of the stack in use.
    The stack in use is the one that the command line would use. The first of these that exists decides:

    - the context that TIDEGATE_CONTEXT names
    - the state folder that TIDEGATE_STATE_DIR names
    - a stack in the current folder
    - the current context
    - the default settings

    If ``key`` is None, use TIDEGATE_API_KEY. If this variable is not set either, use the key in the settings
    of the stack in use. Any other gateway then gets no key.

    Raise BadRequest if a setting is wrong, NotFound if the context is unknown.
    """
    given = environ.get("TIDEGATE_API_KEY", "") if key is None else key
    if stated := url or environ.get("TIDEGATE_GATEWAY_URL"):
        return Address(stated.rstrip("/"), given)
    return _in_use(key, environ)


def _in_use(key: str | None, environ: Mapping[str, str]) -> Address:
    from tidegate.client import contexts
    from tidegate.kernel.settings.base import Settings
    from tidegate.kernel.settings.report import WRONG, problem_of

    found = contexts.find("", environ, Path.cwd(), contexts.read())
    try:
        settings = Settings(**found.fields)
    except WRONG as error:
        raise BadRequest(f"A setting is wrong: {problem_of(error)}.") from None
    held = settings.api_key or settings.service_token
    cert, ca = (str(path) if path else None for path in (settings.tls_cert, settings.tls_ca))
    return Address(settings.gateway_url.rstrip("/"), held if key is None else key, cert, ca)
