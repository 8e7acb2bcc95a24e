"""Replace Triton's ``triton_python_backend_utils``, so that what a model prints appears immediately.

Triton's Python ignores PYTHONUNBUFFERED and PYTHONUTF8. So stdout and stderr would buffer 8 KiB and fail on
letters that are not ASCII. This module corrects the buffering and the encoding.

This file is copied beside each ``model.py`` under the name of Triton's module. So Triton finds this module
first on sys.path, and imports it before the model. Then this module executes the code of Triton's module.
"""

# ruff: noqa: PTH100, PTH120, PTH123

import os
import sys
from importlib.machinery import PathFinder

for _stream in (sys.stdout, sys.stderr):
    if hasattr(_stream, "reconfigure"):
        _stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)

_here = os.path.dirname(os.path.abspath(__file__))
_others = [_path for _path in sys.path if os.path.abspath(_path) != _here]
_spec = PathFinder.find_spec(__name__, _others)
if _spec is None or _spec.origin is None:
    raise ImportError(f"Triton's {__name__} is not on sys.path: {_others}")
__file__ = _spec.origin
with open(_spec.origin, encoding="utf-8") as _file:
    exec(compile(_file.read(), _spec.origin, "exec"))
