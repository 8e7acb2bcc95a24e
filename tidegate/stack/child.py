"""The description of a process of the stack: its command, readiness probe and stop order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

MARK = "TIDEGATE_STACK"
"""An environment variable that every process of a stack inherits: the absolute state folder."""

REPLICA = "TIDEGATE_REPLICA"
"""An environment variable of a worker and its model server: the replica's name."""


@dataclass(frozen=True, slots=True)
class Port:
    """A port that a child listens on, and the setting that changes it."""

    number: int
    setting: str
    host: str = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Probe:
    """A readiness probe in the child's own protocol.

    ``path``: the path of the URL; only for ``http`` and ``https``.
    ``login``: a user and the file with the user's password, if the server requires a login.
    """

    kind: Literal["tcp", "amqp", "valkey", "http", "https"]
    port: int
    host: str = "127.0.0.1"
    login: tuple[str, Path] | None = None
    path: str = "/health/ready"


@dataclass(frozen=True, slots=True)
class Child:
    """A part of the stack: a process that the supervisor starts.

    ``probe``: None for a process that runs once at the start and must exit with 0. ``after``: the children
    that must be ready before this child starts. ``stop_order``: the child with the lowest number stops first.
    ``after_stop``: a command that runs after the child has ended. ``files``: the path and the text of each
    file to write before each start. ``links``: the path and the target of each symbolic link to create before
    each start.

    ``optional``: True if the stack counts as ready without this child. If the start of an optional child
    fails, the supervisor starts the child again.

    ``sockets``: ports by name. The supervisor keeps the listening sockets of these ports, so that a restart
    refuses no connection. ``processes``: the number of serving processes in this child. Each of them has
    sockets of its own.
    """

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    probe: Probe | None
    stop_order: int
    ports: tuple[Port, ...] = ()
    after: tuple[str, ...] = ()
    folders: tuple[Path, ...] = ()
    files: Mapping[Path, str] = field(default_factory=dict)
    links: Mapping[Path, Path] = field(default_factory=dict)
    after_stop: tuple[str, ...] = ()
    start_limit_s: float = 120.0
    grace_s: float = 15.0
    optional: bool = False
    sockets: Mapping[str, Port] = field(default_factory=dict)
    processes: int = 1
