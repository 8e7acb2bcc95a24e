"""Peers: the measured servers. Each has a folder below ``peers/``; its ``peer.toml`` says how to start it."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks import places
from benchmarks.workloads import Name, Wire

Role = Literal["reference", "tidegate", "server", "queue", "limit"]
"""Triton asked directly; Tidegate; a model server; a web framework with a task queue; serving in process."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A server to measure.

    ``commands`` may contain ``{python}`` (of the peer's own environment), ``{ours}`` (of the checkout),
    ``{bin}`` and ``{port}``. All commands are started together. ``needs`` names servers that must run
    first. ``setup`` describes the configuration for readers of the table. ``keyed``: requests have an API
    key.
    """

    name: str
    title: str
    role: Role
    setup: str
    commands: tuple[tuple[str, ...], ...]
    wires: dict[Name, Wire]
    ready: str
    needs: tuple[str, ...] = ()
    start_limit_s: float = 60.0
    keyed: bool = False

    @property
    def folder(self) -> Path:
        """The folder of the peer's files."""
        return places.PEERS / self.name.partition("@")[0]

    @property
    def server(self) -> str:
        """The name of the server: peers with and without a key share one."""
        return self.name.partition("@")[0] if self.keyed else self.name

    @property
    def has_environment(self) -> bool:
        """True if the peer has its own packages."""
        return (self.folder / "requirements.lock").exists()


def all_peers() -> list[Peer]:
    """Return every peer, Triton and Tidegate first. A file may describe variants of one server."""
    found = [peer for path in places.PEERS.glob("*/peer.toml") for peer in _read(path)]
    order: tuple[Role, ...] = ("reference", "tidegate", "server", "queue", "limit")
    return sorted(found, key=lambda peer: (order.index(peer.role), peer.name))


def _read(path: Path) -> list[Peer]:
    given = tomllib.loads(path.read_text())
    variants: dict[str, dict[str, Any]] = given.pop("variants", {})
    name = path.parent.name
    return [_peer(name, given), *(_peer(f"{name}@{key}", given | own) for key, own in variants.items())]


def _peer(name: str, given: dict[str, Any]) -> Peer:
    return Peer(
        name=name,
        title=given["title"],
        role=given["role"],
        setup=given["setup"],
        commands=tuple(tuple(command) for command in given.get("commands", ())),
        wires=given["wires"],
        ready=given.get("ready", "/ready"),
        needs=tuple(given.get("needs", ())),
        start_limit_s=given.get("start_limit_s", 60.0),
        keyed=given.get("keyed", False),
    )
