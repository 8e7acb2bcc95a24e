"""Read single keys from the terminal, without waiting for Enter. The terminal is restored at the end."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def keys() -> Iterator[Callable[[float], str]]:
    """Yield a function that waits for a pressed key and returns it.

    The function's argument is the longest wait in seconds. If no key is pressed in this time, the function
    returns an empty text. Without a terminal, and on Windows, the function only waits.
    """
    try:
        import select
        import termios
        import tty

        file = sys.stdin.fileno()
        before = termios.tcgetattr(file)
    except (ImportError, OSError, ValueError, AttributeError, termios_error()):
        yield _wait
        return

    def pressed(seconds: float) -> str:
        ready, _, _ = select.select([file], [], [], seconds)
        return os.read(file, 1).decode("latin-1") if ready else ""

    try:
        tty.setcbreak(file)
        yield pressed
    finally:
        termios.tcsetattr(file, termios.TCSADRAIN, before)


def _wait(seconds: float) -> str:
    time.sleep(seconds)
    return ""


def termios_error() -> type[Exception]:
    """Return the type of the error that termios raises for a file that is not a terminal."""
    try:
        import termios
    except ImportError:
        return OSError
    return termios.error
