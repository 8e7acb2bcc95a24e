"""A separate PostgreSQL for tests: the system's package, with its own folder and socket, without root."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_LIMIT_S = 120.0
GUARDED = "guarded"  # the only user who needs a password
POLL_S = 0.02
# Durability is not what is tested; without it a database is made in a tenth of the time.
FAST = ("fsync=off", "full_page_writes=off", "synchronous_commit=off", "shared_buffers=32MB")
# PostgreSQL refuses to run as root. Debian's package makes the first of these users.
OTHER_USERS = ("postgres", "nobody")


class NoPostgres(Exception):
    """No server can be started here. The message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Server:
    """A running server. It accepts everyone who can open its socket."""

    folder: Path

    def url(self, database: str) -> str:
        """Return the URL of a database, for TIDEGATE_DATABASE_URL."""
        return f"postgresql+asyncpg://tidegate@/{database}?host={self.folder}"


@contextmanager
def running() -> Iterator[Server]:
    """Run a server during the block. Raise NoPostgres."""
    programs, user = _programs(), _user()
    # Not in the tests' own folder: another user could not enter it, and a socket's path is short.
    with tempfile.TemporaryDirectory(prefix="tidegate-postgres-") as name:
        folder, log = Path(name), Path(name) / "log"
        how: dict[str, Any] = {"cwd": folder, "stdin": subprocess.DEVNULL}
        if user is not None:
            os.chown(folder, user.pw_uid, user.pw_gid)
            how |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        settings = [part for setting in FAST for part in ("-c", setting)]
        make = [f"{programs}/initdb", "-D", f"{folder}/data", "-U", "tidegate", "-A", "trust", "-E", "UTF8"]
        serve = [f"{programs}/postgres", "-D", f"{folder}/data", "-k", name, "-h", "", *settings]
        with log.open("wb") as out:
            how |= {"stdout": out, "stderr": out}
            made = subprocess.run([*make, "--no-sync", *_locale(programs)], check=False, **how)
            if made.returncode != 0:
                raise AssertionError(f"initdb failed: {log.read_text()}")
            rules = folder / "data" / "pg_hba.conf"
            rules.write_text(f"local all {GUARDED} scram-sha-256\n{rules.read_text()}")
            process = subprocess.Popen(serve, **how)
        try:
            _wait_ready(programs, folder, process, log)
            yield Server(folder)
        finally:
            process.send_signal(signal.SIGINT)  # it ends at once and in order
            process.wait()


def _programs() -> Path:
    """Return the folder of the newest installed server's programs."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if found:
        return found[-1].parent
    if (on_path := shutil.which("initdb")) is not None:
        return Path(on_path).resolve().parent
    raise NoPostgres("PostgreSQL is not installed: sudo apt-get install --no-install-recommends postgresql")


def _user() -> pwd.struct_passwd | None:
    """Return the user that must run the server; None: the user of the tests."""
    if os.geteuid() != 0:
        return None
    for name in OTHER_USERS:
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise NoPostgres(f"PostgreSQL does not run as root, and there is no user {' or '.join(OTHER_USERS)}")


def _locale(programs: Path) -> list[str]:
    """Return options for a sort order that ignores punctuation, like many systems. SQLite does not."""
    output = subprocess.run(
        [programs / "initdb", "--version"], capture_output=True, text=True, check=True
    ).stdout
    version = re.search(r"(\d+)", output)
    if version is None or int(version[1]) < 15:
        return ["--locale=C.UTF-8"]
    return ["--locale=C.UTF-8", "--locale-provider=icu", "--icu-locale=en-US-u-ka-shifted"]


def _wait_ready(programs: Path, folder: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_LIMIT_S
    ask = [f"{programs}/pg_isready", "-q", "-h", str(folder), "-U", "tidegate", "-d", "postgres"]
    while subprocess.run(ask, check=False, stdin=subprocess.DEVNULL).returncode != 0:
        if process.poll() is not None or time.monotonic() > end:
            raise AssertionError(f"PostgreSQL did not start: {log.read_text()}")
        time.sleep(POLL_S)
