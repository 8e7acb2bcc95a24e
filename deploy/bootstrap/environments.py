"""The two virtual environments, filled from hash-locked files."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from deploy.bootstrap.command import Runner, environment
from deploy.bootstrap.paths import Paths, python_version
from deploy.bootstrap.step import StepFailed, Tell, fingerprint, stamped

PIP_FLAGS = (
    "--no-input",
    "--disable-pip-version-check",
    "--root-user-action=ignore",
    "--progress-bar=off",
    "--require-hashes",
    # The lock is complete: nothing is left for pip's resolver to find out, which saves its time.
    "--no-deps",
)

SCRIPT = """\
#!/bin/sh
# Started by name from any folder, without activating the environment.
exec "{python}" -P -m tidegate.cli "$@"
"""


def usable(env: Path, module: str) -> bool:
    """True when the environment's interpreter runs, is the one in use, and can import ``module``."""
    code = f"import sys, {module}; print('%d.%d' % sys.version_info[:2], sys.base_prefix)"
    try:
        command = [str(env / "bin" / "python"), "-c", code]
        found = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    except OSError:
        return False
    return found.stdout.strip() == f"{python_version()} {sys.base_prefix}"


def create(paths: Paths, env: Path, runner: Runner, *, log: Path, pip: bool) -> None:
    """Make the environment anew; a folder that is not an environment is left alone."""
    if env.exists() and any(env.iterdir()) and not (env / "pyvenv.cfg").exists():
        raise StepFailed(f"{env} exists and is not a virtual environment.", "Move it away, then try again.")
    shutil.rmtree(env, ignore_errors=True)
    options = [] if pip else ["--without-pip"]
    runner.run([str(paths.python), "-m", "venv", *options, str(env)], log, what=f"Making {env}")


def install(paths: Paths, env: Path, locks: Sequence[Path], runner: Runner, log: Path, tell: Tell) -> None:
    """Install the locked files into an environment, with the pip of the services' one."""
    pinned = sum(len(pins(lock)) for lock in locks)
    seen = 0

    def on_line(line: str) -> None:
        nonlocal seen
        if line.startswith("Collecting"):
            seen += 1
            tell(f"{min(seen, pinned)} of {pinned}: {line.split()[1].split('==')[0]}")
        elif line.startswith("Installing collected"):
            tell("unpacking")

    files = [part for lock in locks for part in ("-r", str(lock))]
    command = [str(paths.venv_python), "-m", "pip", "--python", str(env / "bin" / "python")]
    runner.run([*command, "install", *PIP_FLAGS, *files], log, what="pip install", on_line=on_line)


def filled(env: Path, lock: Path, stamp: Path) -> bool:
    """True when the lock was installed and every package of it is still there."""
    if not stamped(stamp, lock_fingerprint(lock)):
        return False
    site = env / "lib" / f"python{python_version()}" / "site-packages"
    there = {_normal(p.name.removesuffix(".dist-info")) for p in site.glob("*.dist-info")}
    return all(_normal(f"{name}-{version}") in there for name, version in pins(lock))


def lock_fingerprint(lock: Path) -> str:
    """What an installed lock depends on: its bytes and the Python version."""
    return fingerprint(lock.read_bytes(), python_version())


def pins(lock: Path) -> list[tuple[str, str]]:
    """(name, version) of the unconditional pins of a lock."""
    return re.findall(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([^\s;\\]+) *\\?$", lock.read_text(), re.MULTILINE)


def connect(paths: Paths) -> None:
    """Put the repository on the environment's import path, and the command ``tidegate`` into its ``bin``."""
    site = paths.venv / "lib" / f"python{python_version()}" / "site-packages"
    (site / "tidegate.pth").write_text(f"{paths.root}\n")
    script = paths.venv / "bin" / "tidegate"
    script.write_text(SCRIPT.format(python=paths.venv_python))
    script.chmod(0o755)


def connected(paths: Paths) -> bool:
    """True when both are there and point here."""
    site = paths.venv / "lib" / f"python{python_version()}" / "site-packages"
    script = paths.venv / "bin" / "tidegate"
    return (
        stamped(site / "tidegate.pth", f"{paths.root}\n")
        and stamped(script, SCRIPT.format(python=paths.venv_python))
        and os.access(script, os.X_OK)
    )


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
