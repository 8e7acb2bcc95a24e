"""A server's TLS certificate, which is reloaded when its files change."""

from __future__ import annotations

import asyncio
import os
import ssl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tidegate.kernel import telemetry
from tidegate.kernel.settings.base import Settings

log = telemetry.logger(__name__)

POLL_S = 2.0


class BadCertificate(Exception):
    """An error: a certificate or key file is missing or unreadable, or the two do not belong together."""


class ServerCertificate:
    """A certificate chain and its key. New connections use the newest pair; open ones keep their pair."""

    def __init__(self, cert: Path, key: Path) -> None:
        """Read both files. Raises BadCertificate if they cannot be used."""
        self._cert = cert
        self._key = key
        self._contexts: list[ssl.SSLContext] = []
        self._used = self._read()
        _load(_new_context(), *self._used, cert, key)
        self._problem = ""

    def context(self, *protocols: str) -> ssl.SSLContext:
        """Return a server's context with these ALPN protocols. It always uses the newest certificate."""
        made = _new_context()
        made.set_alpn_protocols(list(protocols))
        _load(made, *self._used, self._cert, self._key)
        self._contexts.append(made)
        return made

    def refresh(self) -> bool:
        """Load the files if they have changed and match. Return True if a new pair is in use.

        An incomplete or broken pair is ignored and logged once.
        """
        try:
            found = self._read()
            if found == self._used:
                return False
            # First load the files into a context that is not in use. A failed load leaves half of a pair in
            # its context.
            _load(_new_context(), *found, self._cert, self._key)
            for context in self._contexts:
                _load(context, *found, self._cert, self._key)
        except BadCertificate as problem:
            if str(problem) != self._problem:
                self._problem = str(problem)
                log.warning("the new certificate is not used; the old one is still in use: %s", problem)
            return False
        self._used, self._problem = found, ""
        log.info("the certificate was renewed", extra={"file": str(self._cert)})
        return True

    async def watch(self) -> None:
        """Reload the files after each change, until this task is cancelled."""
        while True:
            await asyncio.sleep(POLL_S)
            self.refresh()

    def _read(self) -> tuple[bytes, bytes]:
        try:
            return self._cert.read_bytes(), self._key.read_bytes()
        except OSError as error:
            raise BadCertificate(f"{error.filename} cannot be read: {error.strerror}") from None


def certificate_of(settings: Settings) -> ServerCertificate | None:
    """Return the certificate that the settings name, or None if they name none.

    Raises SystemExit if the certificate cannot be used.
    """
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    try:
        return ServerCertificate(settings.tls_cert, settings.tls_key)
    except BadCertificate as problem:
        raise SystemExit(f"TIDEGATE_TLS_CERT and TIDEGATE_TLS_KEY: {problem}.") from None


def _new_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    return context


def _load(context: ssl.SSLContext, cert: bytes, key: bytes, cert_file: Path, key_file: Path) -> None:
    """Load a certificate and its key into ``context``. Raises BadCertificate if this fails.

    ``cert``, ``key``: the bytes that were read from the files. The files are not read again, because they may
    have changed since they were read. ``cert_file``, ``key_file``: the names of the files, for the error's
    message.
    """
    try:
        with _file(cert) as cert_copy, _file(key) as key_copy:
            context.load_cert_chain(cert_copy, key_copy, password=_no_password)
    except (OSError, ValueError) as error:  # this includes ssl.SSLError
        raise BadCertificate(
            f"{cert_file} and {key_file} are not a PEM certificate chain and its key: {error}"
        ) from None


def _no_password() -> str:
    raise ValueError("the key has a password; Tidegate needs a key without one")


@contextmanager
def _file(data: bytes) -> Iterator[str]:
    """Yield the path of a temporary file with these bytes. OpenSSL loads certificates only from paths."""
    if hasattr(os, "memfd_create"):
        number = os.memfd_create("certificate", os.MFD_CLOEXEC)
        with os.fdopen(number, "wb") as memory:
            memory.write(data)
            memory.flush()
            yield f"/proc/self/fd/{number}"
    else:
        with tempfile.NamedTemporaryFile() as disk:  # its mode is 0600
            disk.write(data)
            disk.flush()
            yield disk.name
