"""Make numpy 1 load pickles of numpy 2.

Some of these pickles name modules that numpy 2 renamed. Others contain random generators in the format of
numpy 2. Triton's Python backend works only with numpy 1, but many estimators are saved with numpy 2.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

_made: dict[type, type] = {}


def accept() -> None:
    """Make pickles of numpy 2 loadable. Do nothing if numpy 2 is installed."""
    if int(np.__version__.partition(".")[0]) >= 2:
        return
    for name in [name for name in sys.modules if name.startswith("numpy.core")]:
        sys.modules.setdefault(name.replace("numpy.core", "numpy._core", 1), sys.modules[name])
    pickled = importlib.import_module("numpy.random._pickle")
    name = "__bit_generator_ctor"
    setattr(pickled, name, _generators(getattr(pickled, name)))
    for name, kind in (
        ("__randomstate_ctor", np.random.RandomState),
        ("__generator_ctor", np.random.Generator),
    ):
        setattr(pickled, name, _holders(kind, getattr(pickled, name)))


def _generators(before: Callable[..., Any]) -> Callable[..., Any]:
    """Return a constructor of bit generators. It accepts a class (numpy 2) or a name (numpy 1).

    ``before``: the constructor of numpy 1, which accepts only a name.
    """

    def make(kind: Any = "MT19937") -> Any:
        if isinstance(kind, str):
            return before(kind)
        if kind not in _made:
            _made[kind] = type(kind.__name__, (kind,), {"__setstate__": _set_state, "__module__": __name__})
        return _made[kind]()

    return make


def _set_state(generator: Any, state: Any) -> None:
    # numpy 2 saves a tuple of the state and the seed.
    generator.state = state[0] if isinstance(state, tuple) else state


def _holders(kind: Any, before: Callable[..., Any]) -> Callable[..., Any]:
    """Return a constructor of ``kind`` that accepts a bit generator (numpy 2) or its name (numpy 1)."""

    def make(generator: Any = "MT19937", *rest: Any) -> Any:
        return kind(generator) if isinstance(generator, np.random.BitGenerator) else before(generator, *rest)

    return make
