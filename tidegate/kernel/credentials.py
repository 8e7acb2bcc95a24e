"""Store the passwords for RabbitMQ and the stores: one file for each server and service.

The files are in a folder of secrets, as ``<server>/<service>``. Only their owner can read them. A service
reads its own file and puts the password into the server's URL. No argument and no environment variable
contains a password.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

RABBITMQ, VALKEY, VALKEY_JOBS = SERVERS = ("rabbitmq", "valkey", "valkey-jobs")
SERVICES = ("gateway", "registry", "router", "autoscaler", "worker")
"""The accounts of the services at each server."""


def ensure(folder: Path) -> None:
    """Write a random 256-bit password for each pair of server and service that has none."""
    for server in SERVERS:
        for service in SERVICES:
            place = folder / server / service
            place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_once(place, secrets.token_urlsafe(32))


def read(folder: Path, server: str, service: str) -> str:
    """Return the password of a service at a server; empty if it has none."""
    try:
        return (folder / server / service).read_text().strip()
    except FileNotFoundError:
        return ""


def read_all(folder: Path, server: str) -> dict[str, str]:
    """Return the passwords at a server, by service. Services without a password are left out."""
    found = {service: read(folder, server, service) for service in SERVICES}
    return {service: password for service, password in found.items() if password}


def logged_in(url: str, folder: Path, server: str, service: str) -> str:
    """Return ``url`` with the user and password of a service.

    If the URL already names a user, or if ``folder`` has no password of the service, return it unchanged.
    """
    parts = urlsplit(url)
    password = read(folder, server, service) if service else ""
    if not password or parts.username is not None:
        return url
    return urlunsplit(parts._replace(netloc=f"{service}:{quote(password, safe='')}@{parts.netloc}"))


def write_once(place: Path, text: str) -> None:
    """Write a secret to a file of mode 0600. If the file already contains a secret, keep that secret.

    The text is written to another file, which is then linked to the final name. So a reader never gets half
    of the text, and all concurrent writers use the same secret.
    """
    if place.is_file() and place.read_text().strip():
        place.chmod(0o600)
        return
    fresh = place.with_name(f".{place.name}.{os.getpid()}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text + "\n")
    try:
        os.link(fresh, place)
    except FileExistsError:
        # Replace an empty file, but keep a secret that another writer has written meanwhile.
        if not (place.is_file() and place.read_text().strip()):
            fresh.replace(place)
    fresh.unlink(missing_ok=True)
