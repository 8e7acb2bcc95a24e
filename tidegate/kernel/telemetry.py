"""Write logs as JSON lines with the id of the current request."""

from __future__ import annotations

import logging
import sys
from contextvars import ContextVar
from datetime import datetime, timezone

from pythonjsonlogger.json import JsonFormatter

from tidegate.kernel.protocol.request_ids import LONGEST_ID as LONGEST_ID
from tidegate.kernel.protocol.trace_context import SEPARATOR

request_id: ContextVar[str] = ContextVar("request_id", default="")


def shown_id(raw: bytes) -> str:
    """Return the id of a request as it appears in logs.

    ``raw``: the id, or a frame's field ``trace``, which begins with the id.
    """
    return raw.partition(SEPARATOR)[0].decode("latin-1")[:LONGEST_ID]


def logger(name: str) -> logging.Logger:
    """Return the logger of a module.

    The calling code passes structured fields to the logger with ``extra={...}``.
    """
    return logging.getLogger(name)


class _Formatter(JsonFormatter):
    def __init__(self, service: str) -> None:
        super().__init__("%(message)s", json_ensure_ascii=False)
        self._service = service

    def add_fields(
        self, log_data: dict[str, object], record: logging.LogRecord, message_dict: dict[str, object]
    ) -> None:
        at = datetime.fromtimestamp(record.created, timezone.utc)
        log_data["time"] = at.isoformat(timespec="milliseconds")
        log_data["level"] = record.levelname.lower()
        log_data["service"] = self._service
        log_data["logger"] = record.name
        super().add_fields(log_data, record, message_dict)
        if rid := request_id.get():
            log_data.setdefault("request_id", rid)


def configure(service: str, level: str = "INFO") -> None:
    """Send every log record of the process to stdout, one JSON object per line."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_Formatter(service))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # These libraries log each request or frame at INFO. Our own lines have the same facts and the request id.
    for noisy in ("httpx", "httpcore", "uvicorn.access", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # These libraries log a traceback for each lost connection and each failed reconnect. Our own code logs
    # one line instead.
    for repeating in ("aio_pika", "aiormq"):
        logging.getLogger(repeating).setLevel(logging.CRITICAL)
