"""A private RabbitMQ node on the loopback interface, with its own ports, folders, name and cookie."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tidegate.stack.child import Child, Port, Probe
from tidegate.stack.errors import MissingPart

# The possible paths of RabbitMQ's own start script. Debian also installs a wrapper of it in /usr/sbin. The
# wrapper is not used, because it switches to the user `rabbitmq`.
DEBIANS = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
PLACES = (DEBIANS, Path("/opt/rabbitmq/sbin/rabbitmq-server"))

# raft.wal_max_size_bytes: quorum queues keep their log in memory until the log's file is full. A smaller file
# than the default of 512 MB saves memory.
CONFIG = """\
listeners.tcp.1 = 127.0.0.1:{port}
log.console = true
log.console.level = info
log.connection.level = error
log.file = false
vm_memory_high_watermark.relative = 0.3
disk_free_limit.absolute = 200MB
collect_statistics_interval = 60000
max_message_size = 16777216
consumer_timeout = {ack_timeout_ms}
raft.wal_max_size_bytes = 33554432
"""

ERLANG_FLAGS = (
    "-noinput +sbwt none +sbwtdcpu none +sbwtdio none"
    " -start_epmd false -kernel inet_dist_use_interface {127,0,0,1}"
)

# Values for a machine with one core and 1 GB of RAM. The lines of SMALL_CONFIG override earlier lines of the
# configuration. SMALL_FLAGS set one scheduler of each kind. They also reduce Erlang's carriers, which are its
# memory blocks from the system: carriers become smaller, and Erlang caches no freed ones.
SMALL_CONFIG = """\
vm_memory_high_watermark.absolute = 192MB
raft.wal_max_size_bytes = 4194304
"""
SMALL_FLAGS = " +S 1:1 +SDcpu 1:1 +SDio 1 +A 1 +MMmcs 0 +MBlmbcs 128 +MHlmbcs 128"
SMALL_LIMITS = {
    "RABBITMQ_MAX_NUMBER_OF_PROCESSES": "65536",
    "RABBITMQ_MAX_NUMBER_OF_ATOMS": "1048576",
    "RABBITMQ_DISTRIBUTION_BUFFER_SIZE": "8000",
}


def children(
    home: Path,
    *,
    port: int,
    dist_port: int,
    epmd_port: int,
    environ: Mapping[str, str],
    ack_timeout_s: float = 1800.0,
    definitions: str = "",
    small: bool = False,
) -> tuple[Child, Child]:
    """Return two processes: epmd (Erlang's name server) and the RabbitMQ node.

    Both processes write only below ``home``.

    ``small``: True to limit the node to one core and to save 30 MB of memory. ``definitions``: the text of
    RabbitMQ's definitions file (``accounts.py``), which lists the node's users. If it is empty, the node has
    only RabbitMQ's default user.
    """
    ours = {"HOME": str(home), "ERL_EPMD_PORT": str(epmd_port), "ERL_EPMD_ADDRESS": "127.0.0.1"}
    env = {k: v for k, v in environ.items() if not k.startswith(("RABBITMQ_", "ERL_"))} | ours
    server = _server()
    # RabbitMQ treats a ':' in the path of the plugins as a separator. So a home with ':' in its path cannot
    # contain the plugins.
    usual = server == DEBIANS and ":" not in str(home)
    quick = _quick_start(server.resolve().parents[1] / "plugins") if usual else None
    epmd = Child(
        name="epmd",
        argv=(_epmd(), "-port", str(epmd_port), "-address", "127.0.0.1"),
        env=env,
        probe=Probe("tcp", epmd_port),
        stop_order=90,
        ports=(Port(epmd_port, "TIDEGATE_EPMD_PORT"),),
        folders=(home,),
        grace_s=2.0,
    )
    node = Child(
        name="rabbitmq",
        argv=(str(server),),
        env=env | _node_environment(home, dist_port, quick, small=small),
        probe=Probe("amqp", port),
        stop_order=80,
        ports=(Port(port, "TIDEGATE_RABBITMQ_PORT"), Port(dist_port, "TIDEGATE_RABBITMQ_DIST_PORT")),
        after=("epmd",),
        folders=(home / "conf.d", home / "mnesia", home / "log", home / "config", home / "plugins"),
        files=_files(home, port, ack_timeout_s, definitions, small=small),
        links={home / "plugins" / "rabbit": quick.broker} if quick else {},
        start_limit_s=180.0,
        grace_s=30.0,
    )
    return epmd, node


def _files(home: Path, port: int, ack_timeout_s: float, definitions: str, *, small: bool) -> dict[Path, str]:
    config = CONFIG.format(port=port, ack_timeout_ms=max(int(ack_timeout_s * 1e3), 1))
    config += SMALL_CONFIG if small else ""
    files = {home / "enabled_plugins": "[].\n"}
    if definitions:
        files[home / "definitions.json"] = definitions
        config += f"load_definitions = {home / 'definitions.json'}\n"
    return {home / "rabbitmq.conf": config, **files}


@dataclass(frozen=True, slots=True)
class _QuickStart:
    """The folders with which a node starts faster (see :func:`_quick_start`).

    ``broker``: the folder of RabbitMQ's main plugin. ``code``: the folders with Erlang modules that a start
    needs. The folder with the most modules comes first.
    """

    broker: Path
    code: tuple[Path, ...]


def _quick_start(plugins: Path) -> _QuickStart | None:
    """Return folders with which a node starts in half the time.

    Return None if RabbitMQ's main plugin or Erlang is not found.

    A start loads about 600 modules. For each module, Erlang searches one folder after another. It begins with
    the folders of 70 disabled plugins, and continues with Erlang's own folders. About 20,000 of these
    searches fail. So the node gets a plugins folder with only the main plugin, and it searches the folders
    with the most modules first (``code``). Erlang 26 and later cache the content of Erlang's own folders, but
    not of folders that are named explicitly. So for these releases, ``code`` is empty.
    """
    broker = next(plugins.glob("rabbit-*"), None)
    erl = shutil.which("erl")
    if broker is None or erl is None:
        return None
    root = Path(erl).resolve().parents[1]
    releases = [int(each.name) for each in root.glob("releases/*") if each.name.isdigit()]
    if max(releases, default=0) >= 26:
        return _QuickStart(broker, ())
    ours = [f for f in plugins.glob("*/ebin") if not f.parent.name.startswith("rabbitmq_")]
    code = [*ours, *plugins.glob("rabbitmq_prelaunch-*/ebin"), *root.glob("lib/*/ebin")]
    modules = {folder: len(list(folder.glob("*.beam"))) for folder in code}
    return _QuickStart(broker, tuple(sorted(code, key=lambda folder: (-modules[folder], folder))))


def _node_environment(
    home: Path, dist_port: int, quick: _QuickStart | None, *, small: bool
) -> dict[str, str]:
    # RabbitMQ can read its data only under the node name that wrote it. So derive the name from the folder of
    # the data.
    name = hashlib.sha256(str(home).encode()).hexdigest()[:12]
    env = {
        "RABBITMQ_NODENAME": f"tidegate-{name}@localhost",
        "RABBITMQ_DIST_PORT": str(dist_port),
        "RABBITMQ_CONF_ENV_FILE": str(home / "rabbitmq-env.conf"),
        "RABBITMQ_CONFIG_FILE": str(home / "rabbitmq.conf"),
        "RABBITMQ_CONFIG_FILES": str(home / "conf.d"),
        "RABBITMQ_ADVANCED_CONFIG_FILE": str(home / "advanced.config"),
        "RABBITMQ_GENERATED_CONFIG_DIR": str(home / "config"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(home / "enabled_plugins"),
        "RABBITMQ_MNESIA_BASE": str(home / "mnesia"),
        "RABBITMQ_LOG_BASE": str(home / "log"),
        "RABBITMQ_LOGS": "-",
        "RABBITMQ_PID_FILE": str(home / "node.pid"),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": ERLANG_FLAGS + (SMALL_FLAGS if small else ""),
        # This setting makes the script replace itself by the Erlang VM, instead of starting the VM as a
        # child. So SIGTERM reaches the node. The flag -noinput above prevents the VM from reading the
        # terminal.
        "RABBITMQ_ALLOW_INPUT": "1",
    }
    if small:
        env |= SMALL_LIMITS
    if quick is not None:
        env["RABBITMQ_PLUGINS_DIR"] = str(home / "plugins")
        if quick.code:
            # Reverse the folders, because -pa puts each folder before the folders that were named earlier.
            env["RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS"] += " -pa " + " ".join(map(str, reversed(quick.code)))
    return env


def _server() -> Path:
    for place in PLACES:
        if os.access(place, os.X_OK):
            return place
    raise MissingPart("RabbitMQ is not installed: run `make up`, or `sudo apt-get install rabbitmq-server`.")


def _epmd() -> str:
    found = shutil.which("epmd") or next(map(str, Path("/usr/lib/erlang").glob("erts-*/bin/epmd")), None)
    if found is None:
        raise MissingPart("Erlang is not installed: run `make up`, or `sudo apt-get install erlang-base`.")
    return found
