"""Let numpy 1 read what numpy 2 has pickled: renamed modules, and random generators.

Triton's Python backend works with numpy 1 only, and many estimators are saved with numpy 2.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

_made: dict[type, type] = {}


def accept() -> None:
    """Make such pickles loadable from now on; nothing changes where numpy 2 runs."""
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
    """Return a maker of bit generators that takes their class, as numpy 2 writes it, beside their name."""

    def make(kind: Any = "MT19937") -> Any:
        if isinstance(kind, str):
            return before(kind)
        if kind not in _made:
            _made[kind] = type(kind.__name__, (kind,), {"__setstate__": _set_state, "__module__": __name__})
        return _made[kind]()

    return make


def _set_state(generator: Any, state: Any) -> None:
    # numpy 2 writes the state and the seed that it came from.
    generator.state = state[0] if isinstance(state, tuple) else state


def _holders(kind: Any, before: Callable[..., Any]) -> Callable[..., Any]:
    """Return a maker of what holds a bit generator, which numpy 2 gives it whole and numpy 1 by name."""

    def make(given: Any = "MT19937", *rest: Any) -> Any:
        return kind(given) if isinstance(given, np.random.BitGenerator) else before(given, *rest)

    return make
