"""Triton's protocol messages, without the rest of its client library.

``tritonclient.grpc`` imports numpy and more in its ``__init__``, which costs a cold start a quarter of a
second; the generated modules need none of it. So they are loaded through a bare package of the same place,
which is then taken away.
"""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

_PACKAGE = "tritonclient.grpc"


def _load() -> Any:
    if _PACKAGE in sys.modules:
        return importlib.import_module(f"{_PACKAGE}.service_pb2")
    root = find_spec("tritonclient")
    if root is None or not root.submodule_search_locations:
        raise ImportError("tritonclient is not installed")
    bare = ModuleType(_PACKAGE)
    bare.__path__ = [str(Path(place) / "grpc") for place in root.submodule_search_locations]
    sys.modules[_PACKAGE] = bare
    try:
        return importlib.import_module(f"{_PACKAGE}.service_pb2")
    finally:
        del sys.modules[_PACKAGE]


pb: Any = _load()
ModelInferRequest = pb.ModelInferRequest
ModelInferResponse = pb.ModelInferResponse
