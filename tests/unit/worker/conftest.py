"""The modules of the language models' runtime."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

LLM_RUNTIME = Path(__file__).parents[3] / "services" / "worker" / "runtimes" / "llm"


@pytest.fixture(scope="module")
def llm_module() -> Iterator[Callable[[str], ModuleType]]:
    """``llm_module(name)`` imports a module as Triton's Python does: by its plain name."""
    sys.path.insert(0, str(LLM_RUNTIME))
    yield importlib.import_module
    sys.path.remove(str(LLM_RUNTIME))
