"""Record the files whose functions run. Every Python process with this folder in PYTHONPATH loads it.

SIGUSR1 starts a recording. SIGUSR2 ends it and writes the files, in the order of their first call, to
``TRACE_FOLDER/<pid>.json``. It covers the main thread and each thread that is started later.
"""

import json
import os
import signal
import sys
import threading
import types
from pathlib import Path
from typing import Any

_files: dict[str, None] = {}
_recording = False


def _profile(frame: types.FrameType, event: str, _: Any) -> None:
    if _recording and event == "call":
        _files.setdefault(frame.f_code.co_filename)


def _start(*_: Any) -> None:
    global _recording
    _files.clear()
    _recording = True


def _write(*_: Any) -> None:
    global _recording
    _recording = False
    path = Path(os.environ["TRACE_FOLDER"]) / f"{os.getpid()}.json"
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(list(_files)))
    fresh.replace(path)


if "TRACE_FOLDER" in os.environ and {"services.gateway", "services.worker"} & {*sys.orig_argv}:
    signal.signal(signal.SIGUSR1, _start)
    signal.signal(signal.SIGUSR2, _write)
    threading.setprofile(_profile)
    sys.setprofile(_profile)
