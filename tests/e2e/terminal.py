"""A command on a terminal of its own, for tests that type and press Ctrl-C."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import PATIENCE_S

CTRL_C = "\x03"
CTRL_D = "\x04"
_CODES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\r")


class Terminal:
    """The terminal of a running command. ``seen``: everything that appeared on it, without colours."""

    def __init__(self, process: subprocess.Popen[bytes], master: int) -> None:
        self._process = process
        self._master = master
        self._raw = b""
        self._read = 0

    @property
    def seen(self) -> str:
        return _CODES.sub("", self._raw.decode("utf-8", "replace"))

    def type(self, text: str) -> None:
        """Type keys."""
        os.write(self._master, text.encode())

    def wait_for(self, text: str, again: str = "") -> str:
        """Wait until a text appears after what was waited for before. Return all until its end.

        Meanwhile, type ``again`` every 30 seconds: see :meth:`end`.
        """
        end, typed_at = time.monotonic() + PATIENCE_S, time.monotonic()
        while (at := self.seen.find(text, self._read)) < 0:
            assert time.monotonic() < end, f"{text!r} did not appear. The terminal shows:\n{self.seen}"
            if again and time.monotonic() > typed_at + 30:
                self.type(again)
                typed_at = time.monotonic()
            self._look()
        found = self.seen[self._read : at + len(text)]
        self._read = at + len(text)
        return found

    def wait_for_output(self) -> None:
        """Wait until something more appears."""
        before, end = len(self.seen.rstrip()), time.monotonic() + PATIENCE_S
        while len(self.seen.rstrip()) <= before:
            assert time.monotonic() < end, f"Nothing more appeared. The terminal shows:\n{self.seen}"
            self._look()

    def end(self, again: str = "") -> int:
        """Wait until the command ends, and return its exit code. Meanwhile, type ``again`` every few seconds.

        Python's readline sees a Ctrl-C only at the next key if it comes just before it waits for one.
        """
        end, typed_at = time.monotonic() + PATIENCE_S, time.monotonic()
        while (code := self._process.poll()) is None:
            assert time.monotonic() < end, f"The command does not end. The terminal shows:\n{self.seen}"
            if again and time.monotonic() > typed_at + 5:
                self.type(again)
                typed_at = time.monotonic()
            self._look()
        return code

    def _look(self) -> None:
        if select.select([self._master], [], [], 0.1)[0]:
            try:
                self._raw += os.read(self._master, 65536)
            except OSError:  # the command has ended
                time.sleep(0.05)


@contextmanager
def terminal(*arguments: str, env: Mapping[str, str], cwd: Path) -> Iterator[Terminal]:
    """Run ``tidegate ARGUMENTS`` on a new terminal. Kill it after the block if it still runs."""
    master, slave = pty.openpty()

    def take_terminal() -> None:
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "tidegate.cli", *arguments],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**env, "TERM": "xterm", "COLUMNS": "120"},
        cwd=cwd,
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    os.close(slave)
    try:
        yield Terminal(process, master)
    finally:
        process.kill()
        process.wait()
        os.close(master)
