"""Whose certificates our HTTP clients trust."""

from __future__ import annotations

import functools
import ssl

import httpx


def trusted(*urls: str, trust_env: bool = False) -> ssl.SSLContext | bool:
    """``verify`` of an httpx client that calls these URLs and follows no redirect to others.

    By default each client reads the certificates of all authorities, which takes 20 ms in which nothing else
    is done. Here clients for https share what was read once; for http there is nothing to verify.
    """
    plain = all(url.startswith("http://") for url in urls)
    return False if plain else _authorities(trust_env)


@functools.cache
def _authorities(trust_env: bool) -> ssl.SSLContext:
    return httpx.create_ssl_context(trust_env=trust_env)
