"""The certificates that Tidegate's HTTP clients trust."""

from __future__ import annotations

import functools
import os
import ssl
from pathlib import Path
from urllib.parse import urlsplit

import httpx

OWN, MORE = "TIDEGATE_TLS_CERT", "TIDEGATE_TLS_CA"
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


def trusted(
    *urls: str, trust_env: bool = False, own: str | None = None, more: str | None = None
) -> ssl.SSLContext | bool:
    """Return the argument ``verify`` for an httpx client.

    ``urls``: all URLs that the client may call, also after redirects. If all of them are http URLs, the
    client needs no certificates, and the result is False.

    By default each httpx client reads the certificates of all authorities, which blocks the process for 20
    ms. Here the certificates are read once, and all https clients share them.

    The certificates of ``TIDEGATE_TLS_CA`` are trusted in addition to the public ones. ``TIDEGATE_TLS_CERT``
    names the gateway's own certificate. If this file exists and all https URLs are on loopback, only this
    certificate is trusted, for any host name. ``own`` is used if ``TIDEGATE_TLS_CERT`` is not set, and
    ``more`` if ``TIDEGATE_TLS_CA`` is not set.
    """
    encrypted = [url for url in urls if not url.startswith("http://")]
    if not encrypted:
        return False
    own = os.environ.get(OWN) or own
    if own and all(_host(url) in _LOOPBACK for url in encrypted) and Path(own).is_file():
        return _pinned(own, Path(own).stat().st_mtime_ns)
    named = (os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")) if trust_env else ()
    return _authorities(trust_env, named, os.environ.get(MORE) or more)


@functools.cache
def _authorities(trust_env: bool, named: tuple[str | None, ...], more: str | None) -> ssl.SSLContext:
    """Load the trusted certificates, and cache the result.

    ``named``: the certificate paths in the environment. If they change, the certificates are loaded again."""
    context = httpx.create_ssl_context(trust_env=trust_env)
    if more is not None:
        try:
            context.load_verify_locations(cafile=more)
        except (OSError, ssl.SSLError) as error:
            raise ValueError(f"{MORE}: {more} is not a file of PEM certificates: {error}") from None
    return context


@functools.lru_cache(maxsize=4)
def _pinned(path: str, changed: int) -> ssl.SSLContext:
    """Return a context that trusts only the certificate at ``path``, cached until the file changes."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cafile=path)
    return context


def _host(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
