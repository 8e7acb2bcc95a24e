"""Read the output of Triton and its models, and write a limited part of it to the log.

A thread reads the output from a pipe at once, so a model never waits for its log. Output beyond the limit
never reaches a disk.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import logging
import os
import select
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from prometheus_client import Counter

from services.worker.domain.model_output import LINE_BYTES, OutputLimit, OutputLine, OutputReader
from tidegate.kernel import telemetry

DROPPED = Counter("tidegate_worker_model_log_dropped_bytes_total", "Output of models that was not kept.")

BLOCK = 64 * 1024
# Blocks of this size are skipped without being read line by line if they are beyond the limit.
FLOOD_BYTES = 4 * 1024
# The raw output in the replica's folder is cut to its last KEPT_BYTES when it is longer than this.
LIMIT_BYTES = 4 * 2**20
KEPT_BYTES = 64 * 1024
# How long to wait for the end of the output after Triton has ended.
SETTLE_S = 0.25
POLL_S = 0.002
# How often dropped lines are reported.
REPORT_EVERY_S = 1.0

_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class ModelLog:
    """The log of one Triton after another; ``path`` has the end of the output, unchanged."""

    def __init__(self, path: Path, bytes_per_s: int) -> None:
        self.path = path
        self._model_limit = OutputLimit(bytes_per_s)
        # Triton writes a line for each failed request. These must not displace the model's own lines.
        self._triton_limit = OutputLimit(bytes_per_s)
        self._per_s = bytes_per_s
        self._pipe = -1
        self._busy = False
        self._reported_at = 0.0
        # All levels are logged, whatever the worker's own level is: the author of the model chose them.
        self._loggers = {name: telemetry.logger(name) for name in ("model", "triton")}
        for each in self._loggers.values():
            each.setLevel(logging.DEBUG)
            # Without a configured log, nothing goes to the terminal.
            each.addHandler(logging.NullHandler())

    @contextlib.contextmanager
    def writer(self) -> Iterator[int]:
        """Yield a descriptor for a process to write to. Reading ends when no process has it open any more."""
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        try:
            yield theirs
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        self._pipe = ours
        threading.Thread(target=self._read, args=(ours,), name="model log", daemon=True).start()

    def catch_up(self) -> None:
        """Wait until all output so far is in ``path``, at most SETTLE_S."""
        ends_at = time.monotonic() + SETTLE_S
        while time.monotonic() < ends_at and (self._busy or self._unread()):
            time.sleep(POLL_S)

    def _unread(self) -> bool:
        if self._pipe < 0:
            return False
        count = array.array("i", [0])
        try:
            fcntl.ioctl(self._pipe, termios.FIONREAD, count)
        except OSError:
            return False
        return count[0] > 0

    def _read(self, pipe: int) -> None:
        reader = OutputReader()
        with self.path.open("ab", buffering=0) as raw, contextlib.suppress(OSError):
            while data := self._next(pipe):
                if not self._skipped(reader, data):
                    self.keep(reader.feed(data), raw)
            self.keep(reader.end(), raw)
        self._report_dropped(time.monotonic(), now_due=True)
        if self._pipe == pipe:
            self._pipe = -1
        self._busy = False
        os.close(pipe)

    def _skipped(self, reader: OutputReader, data: bytes) -> bool:
        now = time.monotonic()
        if len(data) < FLOOD_BYTES or not self._model_limit.exhausted(len(data), now):
            return False
        lines = reader.skip(data)
        if lines is None:
            return False
        self._model_limit.drop(lines, len(data))
        self._report_dropped(now)
        return True

    def _next(self, pipe: int) -> bytes:
        self._busy = False
        while not select.select([pipe], [], [], REPORT_EVERY_S if self._model_limit.dropped.lines else None)[
            0
        ]:
            self._report_dropped(time.monotonic(), now_due=True)
        self._busy = True  # before the pipe is empty: see `catch_up`
        return os.read(pipe, BLOCK)

    def keep(self, lines: list[OutputLine], raw: IO[bytes]) -> None:
        """Write lines within the limit to ``raw``, unchanged, and to the log."""
        now = time.monotonic()
        kept = [line for line in lines if self._limit_of(line).take(len(line.text), now, LINE_BYTES)]
        if kept:
            self._write(kept, raw)
        for line in kept:
            if line.logged:
                self._loggers[line.source].log(
                    _LEVELS[line.level], "%s", line.text, extra={"source": line.source}
                )
        self._report_dropped(now)

    def _limit_of(self, line: OutputLine) -> OutputLimit:
        return self._triton_limit if line.source == "triton" else self._model_limit

    def _report_dropped(self, now: float, *, now_due: bool = False) -> None:
        due = now_due or now - self._reported_at >= REPORT_EVERY_S
        if due and (dropped := self._model_limit.settled()) is not None:
            self._reported_at = now
            DROPPED.inc(dropped.bytes)
            self._loggers["model"].warning(
                f"{dropped.lines} lines of the model's output were dropped ({dropped.bytes} bytes): it wrote "
                f"more than TIDEGATE_MODEL_LOG_BYTES_PER_S={self._per_s}",
                extra={"source": "worker", "dropped_lines": dropped.lines, "dropped_bytes": dropped.bytes},
            )

    @staticmethod
    def _write(lines: list[OutputLine], raw: IO[bytes]) -> None:
        raw.write("".join(f"{line.raw}\n" for line in lines).encode(errors="replace"))
        if raw.tell() > LIMIT_BYTES:
            with open(raw.name, "rb") as written:  # noqa: PTH123
                written.seek(-KEPT_BYTES, os.SEEK_END)
                end = written.read()
            raw.truncate(0)
            raw.write(end)
