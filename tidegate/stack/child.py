"""A process of the stack as a plain value: what to run, how to see that it is ready, when to stop it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

MARK = "TIDEGATE_STACK"
"""Environment variable that every process of a stack inherits; its value is the absolute state folder."""

REPLICA = "TIDEGATE_REPLICA"
"""Environment variable of a worker and of its model server: the replica's name."""


@dataclass(frozen=True, slots=True)
class Port:
    """A port that a child listens on, and the setting that moves it."""

    number: int
    setting: str
    host: str = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Probe:
    """How to see that a child is ready: in its own protocol; ``http`` and ``https`` ask /health/ready.

    ``login``: a user, and the file of its password, for a server that answers nobody else.
    """

    kind: Literal["tcp", "amqp", "valkey", "http", "https"]
    port: int
    host: str = "127.0.0.1"
    login: tuple[str, Path] | None = None


@dataclass(frozen=True, slots=True)
class Child:
    """One process of the stack.

    ``probe`` None means a step: it runs once and must exit with 0. ``after`` names children that must be
    ready first. Children stop in the order of ``stop_order``; ``after_stop`` is a command that runs once
    the child is gone. Before each start ``files`` are written, and ``links`` (place to target) are made.
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
    start_limit_s: float = 60.0
    grace_s: float = 15.0
