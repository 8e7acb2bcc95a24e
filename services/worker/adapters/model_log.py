"""Read the output of Triton and its models, and write it to the log, up to a limit.

A thread reads the output from a pipe immediately, so that a model never waits for its log. Output beyond the
limit is dropped, so that a model cannot fill the disk.
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

DROPPED = Counter(
    "tidegate_worker_model_log_dropped_bytes_total", "Bytes of the models' output that were dropped."
)

BLOCK = 64 * 1024
# When the model has used up its limit of output, a read of at least this many bytes is dropped. Its lines are
# not parsed. This saves CPU time while a model floods its log.
FLOOD_BYTES = 4 * 1024
# The most bytes in the file of raw output. A larger file is cut to its last KEPT_BYTES.
LIMIT_BYTES = 4 * 2**20
KEPT_BYTES = 64 * 1024
# The longest time in seconds that :meth:`ModelLog.catch_up` waits.
SETTLE_S = 0.25
POLL_S = 0.002
# Seconds between two reports of dropped lines.
REPORT_EVERY_S = 1.0

_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class ModelLog:
    """The log of one Triton and its models. It continues when Triton is started again.

    The file ``path`` contains the end of the raw output.
    """

    def __init__(self, path: Path, bytes_per_s: int) -> None:
        self.path = path
        self._model_limit = OutputLimit(bytes_per_s)
        # Triton's own lines have a separate limit. Triton writes a line for each failed request, and these
        # lines must not use up the limit of the model's lines.
        self._triton_limit = OutputLimit(bytes_per_s)
        self._per_s = bytes_per_s
        self._pipe = -1
        self._busy = False
        self._reported_at = 0.0
        # Log all levels, even those below the worker's own level, because the model's author chose them.
        self._loggers = {name: telemetry.logger(name) for name in ("model", "triton")}
        for each in self._loggers.values():
            each.setLevel(logging.DEBUG)
            # If no log is configured, do not write to the terminal.
            each.addHandler(logging.NullHandler())

    @contextlib.contextmanager
    def writer(self) -> Iterator[int]:
        """Yield the descriptor of a pipe. The calling code passes it to a process as its output.

        The output is read until every process has closed the descriptor.
        """
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
        """Wait until ``path`` contains all output so far, but at most SETTLE_S seconds."""
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
        self._busy = True  # set before the read, so that `catch_up` waits for this read
        return os.read(pipe, BLOCK)

    def keep(self, lines: list[OutputLine], raw: IO[bytes]) -> None:
        """Write lines to ``raw``, and to the log if their :attr:`OutputLine.logged` is True.

        Triton and the model each have a limit in bytes per second. Lines beyond their limit are dropped.
        """
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
                f"{dropped.lines} lines of the model's output were dropped ({dropped.bytes} bytes): the "
                f"model wrote more than TIDEGATE_MODEL_LOG_BYTES_PER_S={self._per_s}",
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
