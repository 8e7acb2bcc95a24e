"""Whose certificates our HTTP clients trust."""

from __future__ import annotations

import functools
import os
import ssl

import httpx


def trusted(*urls: str, trust_env: bool = False) -> ssl.SSLContext | bool:
    """``verify`` of an httpx client that calls these URLs and follows no redirect to others.

    By default each client reads the certificates of all authorities, which takes 20 ms in which nothing else
    is done. Here clients for https share what was read once; for http there is nothing to verify.
    """
    if all(url.startswith("http://") for url in urls):
        return False
    named = (os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")) if trust_env else ()
    return _authorities(trust_env, named)


@functools.cache
def _authorities(trust_env: bool, named: tuple[str | None, ...]) -> ssl.SSLContext:
    """``named``: where the environment has them, since httpx reads other ones when that changes."""
    return httpx.create_ssl_context(trust_env=trust_env)
