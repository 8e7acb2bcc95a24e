"""The accounts of the services at RabbitMQ and the Valkeys, as those servers read them when they start."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping

from tidegate.permissions import BROKER

VHOST = "/"
# RabbitMQ's default user. A node of an earlier release has it, with the password that everybody knows.
GUEST = "guest"


def rabbitmq_definitions(passwords: Mapping[str, str]) -> str:
    """Return RabbitMQ's definitions: a user for each service, with its permissions and no others.

    ``passwords`` are the services', by name. The same passwords give the same text.
    """
    users = [
        {
            "name": service,
            "password_hash": _rabbitmq_hash(password),
            "hashing_algorithm": "rabbit_password_hashing_sha256",
            "tags": [],
        }
        for service, password in passwords.items()
    ]
    locked = _rabbitmq_hash("".join(passwords.values()))
    guest = {"name": GUEST, "password_hash": locked, "tags": []}
    permissions = [
        {
            "user": service,
            "vhost": VHOST,
            "configure": BROKER[service].configure,
            "write": BROKER[service].write,
            "read": BROKER[service].read,
        }
        for service in passwords
    ]
    permissions.append({"user": GUEST, "vhost": VHOST, "configure": "^$", "write": "^$", "read": "^$"})
    document = {"users": [*users, guest], "vhosts": [{"name": VHOST}], "permissions": permissions}
    return json.dumps(document, indent=1) + "\n"


def valkey_users(passwords: Mapping[str, str], rules: Mapping[str, str]) -> str:
    """Return Valkey's ACL file: a user for each service, with its rules; anybody else may only PING.

    ``passwords`` and ``rules`` are by the service's name (``tidegate.permissions``).
    """
    lines = ["user default on nopass resetkeys resetchannels -@all +ping"]
    for service, password in passwords.items():
        digest = hashlib.sha256(password.encode()).hexdigest()
        lines.append(f"user {service} on #{digest} {rules[service]}")
    return "\n".join(lines) + "\n"


def _rabbitmq_hash(password: str) -> str:
    """Return a password as RabbitMQ stores it: base64 of a 4-byte salt and sha256(salt + password).

    The salt follows from the password, so that the text stays the same; these passwords are random, so that
    no table of hashes has them.
    """
    salt = hashlib.sha256(f"salt {password}".encode()).digest()[:4]
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()
