"""Write the files with the services' accounts. RabbitMQ and the Valkeys read them when they start."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from tidegate.kernel import credentials
from tidegate.kernel.broker.permissions import BROKER, JOB_STORE, LIVE_STORE

VHOST = "/"
# RabbitMQ users whose passwords are well known. They are locked: each gets an unknown password and no
# permissions. `guest` is RabbitMQ's default user. `tidegate` is the user that earlier releases had in
# containers.
LOCKED = ("guest", "tidegate")


def rabbitmq_definitions(passwords: Mapping[str, str]) -> str:
    """Return RabbitMQ's definitions: a user for each service, with only the permissions that it needs.

    ``passwords``: the password of each service. The same passwords always result in the same text.
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
    unknown = _rabbitmq_hash("".join(passwords.values()))
    locked = [{"name": name, "password_hash": unknown, "tags": []} for name in LOCKED]
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
    nothing = {"vhost": VHOST, "configure": "^$", "write": "^$", "read": "^$"}
    permissions += [{"user": name, **nothing} for name in LOCKED]
    document = {"users": [*users, *locked], "vhosts": [{"name": VHOST}], "permissions": permissions}
    return json.dumps(document, indent=1) + "\n"


def valkey_users(passwords: Mapping[str, str], rules: Mapping[str, str]) -> str:
    """Return Valkey's ACL file: a user for each service, with its rules, and no other user.

    ``passwords``, ``rules``: the password and the rule of each service
    (:mod:`tidegate.kernel.broker.permissions`).
    """
    lines = ["user default off resetkeys resetchannels -@all"]
    for service, password in passwords.items():
        digest = hashlib.sha256(password.encode()).hexdigest()
        lines.append(f"user {service} on #{digest} {rules[service]}")
    return "\n".join(lines) + "\n"


def _rabbitmq_hash(password: str) -> str:
    """Return a password as RabbitMQ stores it: base64 of a 4-byte salt and sha256(salt + password).

    The salt is derived from the password, so the same password always has the same hash. Passwords are
    random, so the salt need not be random.
    """
    salt = hashlib.sha256(f"salt {password}".encode()).digest()[:4]
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()


def write(secrets: Path, servers: Path) -> None:
    """Create missing passwords in ``secrets``, and write each server's files below ``servers``.

    A server in a container runs as another user. So every user may read the servers' files, which contain
    hashes instead of passwords. A server's container contains only the folder of this server.
    """
    credentials.ensure(secrets)
    broker, live, jobs = (credentials.read_all(secrets, server) for server in credentials.SERVERS)
    definitions = servers / credentials.RABBITMQ / "definitions.json"
    texts = {
        definitions: rabbitmq_definitions(broker),
        definitions.with_name("rabbitmq.conf"): f"load_definitions = {definitions}\n",
        servers / credentials.VALKEY / "users.acl": valkey_users(live, LIVE_STORE),
        servers / credentials.VALKEY_JOBS / "users.acl": valkey_users(jobs, JOB_STORE),
    }
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o644)


def main() -> None:
    """Write the files for servers in containers: ``python -m tidegate.stack.accounts SECRETS SERVERS``."""
    os.umask(0o022)
    write(Path(sys.argv[1]), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
