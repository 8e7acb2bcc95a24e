"""Create virtual environments, and install the packages of lock files in them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from deploy.bootstrap.command import Runner, environment
from deploy.bootstrap.paths import Paths, python_version
from deploy.bootstrap.step import Report, StepFailed, fingerprint, stamped

PIP_FLAGS = (
    "--no-input",
    "--disable-pip-version-check",
    "--root-user-action=ignore",
    "--progress-bar=off",
    "--require-hashes",
    # The lock file is complete, so pip does not have to resolve dependencies.
    "--no-deps",
)

SCRIPT = """\
#!/bin/sh
# Can be started from any folder, without activating the environment.
exec "{python}" -P -m tidegate.cli "$@"
"""


def usable(env: Path, module: str) -> bool:
    """Return True if the environment uses this Python and can import ``module``."""
    code = f"import sys, {module}; print('%d.%d' % sys.version_info[:2], sys.base_prefix)"
    try:
        command = [str(env / "bin" / "python"), "-c", code]
        found = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    except OSError:
        return False
    return found.stdout.strip() == f"{python_version()} {sys.base_prefix}"


def create(paths: Paths, env: Path, runner: Runner, *, log: Path, pip: bool) -> None:
    """Delete the environment and create it again.

    Raise StepFailed if the folder contains files but is not a virtual environment. Otherwise these files
    would be lost.
    """
    if env.exists() and any(env.iterdir()) and not (env / "pyvenv.cfg").exists():
        raise StepFailed(
            f"{env} exists and is not a virtual environment.",
            "Move it away, then run the same command again.",
        )
    shutil.rmtree(env, ignore_errors=True)
    options = [] if pip else ["--without-pip"]
    runner.run([str(paths.python), "-m", "venv", *options, str(env)], log, what=f"Making {env}")


def install(
    paths: Paths, env: Path, lock: Path, stamp: Path, runner: Runner, log: Path, report: Report
) -> None:
    """Install the packages of the lock file ``lock`` into the environment ``env``.

    The pip of the services' environment installs them, because ``env`` may have no pip. After the
    installation, the file ``stamp`` gets the lock file's fingerprint. From it, :func:`filled` sees later if
    the lock file has changed.
    """
    pinned, seen = len(pins(lock)), 0

    def on_line(line: str) -> None:
        nonlocal seen
        if line.startswith("Collecting"):
            seen += 1
            report(f"{min(seen, pinned)} of {pinned}: {line.split()[1].split('==')[0]}")
        elif line.startswith("Installing collected"):
            report("unpacking")

    pip = [str(paths.venv_python), "-m", "pip", "--python", str(env / "bin" / "python")]
    runner.run([*pip, "install", *PIP_FLAGS, "-r", str(lock)], log, what="pip install", on_line=on_line)
    stamp.write_text(lock_fingerprint(lock))


def filled(env: Path, lock: Path, stamp: Path) -> bool:
    """Return True if this version of the lock file was installed and all its packages are still there."""
    if not stamped(stamp, lock_fingerprint(lock)):
        return False
    site = env / "lib" / f"python{python_version()}" / "site-packages"
    there = {_normal(p.name.removesuffix(".dist-info")) for p in site.glob("*.dist-info")}
    return all(_normal(f"{name}-{version}") in there for name, version in pins(lock))


def lock_fingerprint(lock: Path) -> str:
    """Return a hash of a lock file's bytes and the Python version."""
    return fingerprint(lock.read_bytes(), python_version())


def pins(lock: Path) -> list[tuple[str, str]]:
    """Return the name and version of each package in a lock file.

    Packages with an environment marker are skipped, because pip installs them only on some machines.
    """
    return re.findall(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([^\s;\\]+) *\\?$", lock.read_text(), re.MULTILINE)


def connect(paths: Paths) -> None:
    """Let the services' environment import the repository's packages, and add the command ``tidegate``."""
    site = paths.venv / "lib" / f"python{python_version()}" / "site-packages"
    (site / "tidegate.pth").write_text(f"{paths.root}\n")
    script = paths.venv / "bin" / "tidegate"
    script.write_text(SCRIPT.format(python=paths.venv_python))
    script.chmod(0o755)


def connected(paths: Paths) -> bool:
    """Return True if :func:`connect` has run for this repository."""
    site = paths.venv / "lib" / f"python{python_version()}" / "site-packages"
    script = paths.venv / "bin" / "tidegate"
    return (
        stamped(site / "tidegate.pth", f"{paths.root}\n")
        and stamped(script, SCRIPT.format(python=paths.venv_python))
        and os.access(script, os.X_OK)
    )


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
