"""The protobuf messages of Triton's protocol, without the rest of its client library.

The import of ``tritonclient.grpc`` adds 225 ms to a cold start, because its ``__init__`` imports numpy and
more. The import of its generated modules alone takes only 17 ms. But these modules import each other from
``tritonclient.grpc``, so Python would run its ``__init__``. To prevent this, this module puts an empty
package with the same name and path into ``sys.modules`` during the import.
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
