"""The systemd unit of a stack, as text. Pure: nothing is written or started."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tidegate.stack.starting import LIMIT_S as START_LIMIT_S
from tidegate.stack.stopping import LIMIT_S as STOP_LIMIT_S

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9:_.@-]{0,100}")

_HEAD = """\
# Written by `tidegate service install`. Put your own changes into {name}.service.d/*.conf.
[Unit]
Description=Tidegate model serving ({state})
{order}RequiresMountsFor={mounts}
StartLimitIntervalSec=10min
StartLimitBurst=5

[Service]
# The supervisor stays in the foreground and reports when every part is ready. So other units can wait for it,
# and systemd notices its death immediately. With Type=forking, systemd would have to guess the main process.
Type=notify
NotifyAccess=main
{user}WorkingDirectory={folder}
{environment}ExecStart={run}
ExecReload={restart}
ExecStop={down}
Restart=on-failure
RestartSec=5
TimeoutStartSec={start_limit}
# First, callers get their responses, then jobs and replicas end, then the servers.
TimeoutStopSec={stop_limit}
# `down` ends everything in order. systemd then kills the rest.
KillMode=mixed
# A model that is killed because memory is short is replaced. Its death must not end the stack.
OOMPolicy=continue
Delegate=yes
LimitNOFILE=65536
TasksMax=infinity
UMask=0077

# Hardening. Models need some things that systemd could forbid. So these options stay off:
# - for the models' sandbox, which needs mount and user namespaces: RestrictNamespaces, PrivateUsers,
#   ProtectProc, ProtectKernelTunables, SystemCallFilter
# - for GPUs: PrivateDevices, ProtectClock
# - for the limits of replicas: ProtectControlGroups
# - for compilers within models: MemoryDenyWriteExecute
NoNewPrivileges=yes
LockPersonality=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
{hardening}
[Install]
WantedBy={target}
"""
_ORDER = """\
Wants=network-online.target
After=network-online.target nvidia-persistenced.service
"""
# Only a system-wide unit has these options, because they need mounts. On some systems, the service manager of
# a user cannot create mounts.
_SYSTEM_HARDENING = """\
ProtectSystem=full
ProtectHostname=yes
ProtectKernelModules=yes
"""


@dataclass(frozen=True, slots=True)
class Unit:
    """The values in a unit. ``user``: the account of a system-wide unit; empty for a user's own unit."""

    state: Path
    python: Path
    folder: Path
    user: str = ""
    group: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    name: str = "tidegate"

    @property
    def system(self) -> bool:
        """Return True for a system-wide unit. Only such a unit has an account in ``user``."""
        return bool(self.user)


def check_name(name: str) -> str:
    """Return the name of a unit without its ending. Raise ValueError for an invalid name."""
    bare = name.removesuffix(".service")
    if not _NAME.fullmatch(bare):
        raise ValueError(f"{name!r} cannot be the name of a unit: use letters, digits, '-', '_' and '.'.")
    return bare


def text_of(unit: Unit) -> str:
    """Return the text of the unit. Raise ValueError for a path that a unit cannot contain."""
    for path in (unit.state, unit.python, unit.folder):
        if re.search(r"[\x00-\x1f\x7f]|\\$|\s$", str(path)):
            raise ValueError(
                f"{str(path)!r} has control characters, or ends with a blank or backslash. A unit cannot "
                "contain such a path. Move it to a folder with a plain name."
            )
    user = f"User={unit.user}\n" + (f"Group={unit.group}\n" if unit.group else "") if unit.system else ""
    values = {"TIDEGATE_STATE_DIR": str(unit.state), **unit.environment}
    command = (str(unit.python), "-P", "-m", "tidegate.cli")
    return _HEAD.format(
        name=unit.name,
        state=_path(unit.state),
        mounts=_quoted(str(unit.state)),
        order=_ORDER if unit.system else "",
        user=user,
        folder=_path(unit.folder),
        environment="".join(f"Environment={_quoted(f'{k}={v}')}\n" for k, v in sorted(values.items())),
        run=_command((*command, "service", "run")),
        restart=_command((*command, "restart")),
        down=_command((*command, "down")),
        start_limit=f"{START_LIMIT_S + 30:.0f}",
        stop_limit=f"{STOP_LIMIT_S + 30:.0f}",
        hardening=_SYSTEM_HARDENING if unit.system else "",
        target="multi-user.target" if unit.system else "default.target",
    )


def _command(words: Sequence[str]) -> str:
    # Escape `$`, which begins a variable in a command.
    return " ".join(_quoted(word.replace("$", "$$")) for word in words)


def _quoted(word: str) -> str:
    """Return a word with the quotes and escapes that it needs in a unit.

    In a unit, `%` begins a specifier, and blanks separate words.
    """
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    # Escape line breaks, because systemd would read the text after a line break as another option.
    escaped = re.sub(r"[\x00-\x1f\x7f]", lambda found: f"\\x{ord(found[0]):02x}", escaped)
    return f'"{escaped}"' if re.search(r"[\s\"'\\;]", word) else escaped


def _path(path: Path) -> str:
    return str(path).replace("%", "%%")
