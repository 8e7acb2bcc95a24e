"""Install system packages for the stack, and PostgreSQL for the tests.

The stack needs RabbitMQ, and Python's venv and libpython. Prometheus is optional.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from deploy.bootstrap.command import Runner, environment
from deploy.bootstrap.paths import Paths, libpython, own_library_folder, python_version
from deploy.bootstrap.step import Report, StepFailed

RABBITMQ = (Path("/usr/lib/rabbitmq/bin/rabbitmq-server"), Path("/opt/rabbitmq/sbin/rabbitmq-server"))
POSTGRES = Path("/usr/lib/postgresql")
# Packages that contain a server. After a normal installation, systemd starts this server.
SERVERS = ("rabbitmq-server", "prometheus")

# The stack starts its own RabbitMQ and Prometheus. So this script neither starts nor enables the services of
# these packages. These services would only use memory and the standard ports. The tests create their own
# PostgreSQL clusters. So this script also prevents PostgreSQL's package from creating a cluster that starts
# at each boot.
INSTALL = """
set -e
export DEBIAN_FRONTEND=noninteractive
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  trap 'rm -f "$policy"' EXIT INT TERM HUP
  printf '#!/bin/sh\\nexit 101\\n' >"$policy"
  chmod 755 "$policy"
fi
install="apt-get install -y -q --no-install-recommends -o DPkg::Lock::Timeout=120"
#UPDATE
if [ "$1" = postgresql ]; then
  $install postgresql-common
  conf=/etc/postgresql-common/createcluster.conf
  sed -i 's/^#create_main_cluster = true/create_main_cluster = false #tidegate/' "$conf"
fi
done=0
$install "$@" || done=$?
if [ "$1" = postgresql ]; then
  sed -i 's/^create_main_cluster = false #tidegate/#create_main_cluster = true/' "$conf"
fi
[ "$done" = 0 ] || exit "$done"
case "$1" in
  rabbitmq-server | prometheus)
    [ ! -d /run/systemd/system ] || systemctl disable -q "$1" || true ;;
esac
"""
UPDATE = "apt-get update -q"

MIN_GLIBC = (2, 35)


def rabbitmq_missing() -> list[str]:
    """Return a list with the name of RabbitMQ's Debian package; empty if RabbitMQ is installed."""
    return [] if any(os.access(place, os.X_OK) for place in RABBITMQ) else ["rabbitmq-server"]


def postgres_missing() -> list[str]:
    """Return a list with the name of PostgreSQL's Debian package; empty if a server is installed."""
    there = any(POSTGRES.glob("*/bin/initdb")) or shutil.which("initdb") is not None
    return [] if there else ["postgresql"]


def prometheus_missing() -> list[str]:
    """Return a list with the name of Prometheus's package; empty if Prometheus is installed."""
    return [] if shutil.which("prometheus") else ["prometheus"]


def can_install() -> bool:
    """Return True if this user can install system packages."""
    try:
        _as_root([])
    except StepFailed:
        return False
    return True


def python_missing(paths: Paths) -> list[str]:
    """Return the Debian packages that Python still needs.

    If the virtual environment exists already, the package for venv is left out.
    """
    there = paths.venv_python.exists()
    return [name for name in python_lacks() if not (there and name.endswith("-venv"))]


def python_lacks() -> list[str]:
    """Return the names of the Debian packages that this Python lacks.

    This Python needs them to create environments and to run in Triton.
    """
    wanted = []
    if importlib.util.find_spec("ensurepip") is None:
        wanted.append(f"python{python_version()}-venv")
    if own_library_folder() is None and not _on_loader_path(libpython()):
        wanted.append(f"libpython{python_version()}")
    return wanted


class Packages:
    """Installs system packages. Before the first installation, it fetches the package lists."""

    def __init__(self, paths: Paths, runner: Runner) -> None:
        self._paths = paths
        self._runner = runner
        self._updated = False

    def install(self, missing: Callable[[], list[str]], log_name: str, report: Report) -> None:
        """Install the missing packages. Raise StepFailed if this fails, or if a package is still missing."""
        self._install(missing(), log_name, report)
        importlib.invalidate_caches()
        if still := missing():
            raise StepFailed(
                f"Still missing after the installation: {', '.join(still)}.",
                f"The interpreter in use is {self._paths.python}. The system's own Python 3.11 or 3.12 "
                "always works: TIDEGATE_PYTHON=/usr/bin/python3 make up",
                self._paths.log(log_name),
            )

    def install_for_tests(self, missing: Callable[[], list[str]], log_name: str, report: Report) -> None:
        """Install packages that only tests need. If this fails, report the reason and raise no error.

        The tests that need these packages are then skipped.
        """
        try:
            self._install(missing(), log_name, report)
        except StepFailed as failure:
            report(
                f"some packages were not installed, so the tests that need them are skipped. {failure.what}"
            )

    def _install(self, packages: list[str], log_name: str, report: Report) -> None:
        wanted = [*packages, *python_missing(self._paths), *rabbitmq_missing()]
        as_root = _as_root(list(dict.fromkeys(wanted)))
        script = INSTALL if self._updated else INSTALL.replace("#UPDATE", UPDATE)

        def on_line(line: str) -> None:
            if line.startswith(("Get:", "Unpacking", "Setting up")):
                report(line)

        self._runner.run(
            [*as_root, "sh", "-c", script, "install", *packages],
            self._paths.log(log_name),
            what=f"Installing {', '.join(packages)}",
            on_line=on_line,
        )
        self._updated = True


def _as_root(packages: Sequence[str]) -> list[str]:
    """Return the words that must precede a command so that it runs as root.

    If this user is root, the list is empty. Otherwise it is ``sudo -n``. Raise StepFailed if apt-get is
    missing, or if this user cannot become root. The error names ``packages``.
    """
    names = " ".join(packages)
    if shutil.which("apt-get") is None:
        raise StepFailed(
            f"Missing Debian packages: {names}. This system has no apt-get.",
            _without_apt(packages),
        )
    if os.geteuid() == 0:
        return []
    if shutil.which("sudo") and _succeeds(["sudo", "-n", "true"]):
        return ["sudo", "-n"]
    raise StepFailed(
        f"Missing system packages: {names}. Installing them needs root.",
        "Type this, then run the same command again:\n"
        f"    sudo apt-get update && sudo apt-get install -y --no-install-recommends {names}\n"
        + "".join(
            f"    sudo systemctl disable --now {name}    # Tidegate runs a private one\n"
            for name in packages
            if name in SERVERS
        ).rstrip(),
    )


def _without_apt(packages: Sequence[str]) -> str:
    if list(packages) == ["prometheus"]:
        return (
            "Install Prometheus 2.40 or newer so that PATH has `prometheus`; then run the same command again."
        )
    return (
        "Install RabbitMQ 3.10 or newer so that /usr/lib/rabbitmq/bin/rabbitmq-server exists. Also install "
        f"{libpython()} for Python {python_version()}. Then run the same command again."
    )


def check_platform() -> None:
    """Raise StepFailed if this machine cannot run the stack."""
    machine = f"{platform.system()} {platform.machine()}"
    if machine not in {"Linux x86_64", "Linux aarch64"}:
        raise StepFailed(
            f"The embedded stack runs on Linux (x86_64 or aarch64); this is {machine}.",
            "Use a Linux machine, a virtual machine or a container.",
        )
    name, version = platform.libc_ver()
    if name != "glibc" or tuple(int(part) for part in version.split(".")[:2]) < MIN_GLIBC:
        raise StepFailed(
            f"Triton needs glibc 2.35 or newer; this system has {name or 'another C library'} {version}.",
            "Use Debian 12, Ubuntu 22.04 or anything newer.",
        )


def _on_loader_path(library: str) -> bool:
    ldconfig = shutil.which("ldconfig") or "/sbin/ldconfig"
    try:
        listing = subprocess.run([ldconfig, "-p"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return False
    return f"{library} " in listing


def _succeeds(command: Sequence[str]) -> bool:
    try:
        subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=True, env=environment())
    except (OSError, subprocess.CalledProcessError):
        return False
    return True
