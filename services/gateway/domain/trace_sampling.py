"""Decide which requests are traced. Pure.

The names of the samplers are OpenTelemetry's values for ``OTEL_TRACES_SAMPLER``. OpenTelemetry traces all
requests by default. This is too much for a model server, so the default here is one request in 100.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tidegate.kernel.protocol.trace_context import TraceContext

SAMPLER, ARGUMENT = "OTEL_TRACES_SAMPLER", "OTEL_TRACES_SAMPLER_ARG"
DEFAULT_RATIO = 0.01
_PARENT = "parentbased_"
_FIXED = {"always_on": 1.0, "always_off": 0.0}


@dataclass(frozen=True, slots=True)
class TraceSampler:
    """Sample requests for tracing with the probability ``ratio`` (0 to 1).

    ``by_parent``: True if a caller's own decision has precedence.
    """

    ratio: float
    by_parent: bool = True

    def take(self, parent: TraceContext | None, uniform: Callable[[], float]) -> bool:
        """Return True if a request is traced. ``uniform`` returns a random number from [0, 1).

        If the request has a ``parent``, the decision uses this trace context instead of a random number. So
        all services with the same settings trace the same requests.
        """
        if parent is None:
            return uniform() < self.ratio
        if self.by_parent:
            return parent.sampled
        return (parent.trace_id & (2**64 - 1)) < self.ratio * 2**64


def sampler_of(environment: Mapping[str, str]) -> TraceSampler:
    """Return the sampler that the environment variables name. Raise ValueError if a value is wrong."""
    name = environment.get(SAMPLER) or f"{_PARENT}traceidratio"
    by_parent, kind = name.startswith(_PARENT), name.removeprefix(_PARENT)
    if kind in _FIXED:
        return TraceSampler(_FIXED[kind], by_parent)
    if kind != "traceidratio":
        raise ValueError(f"{SAMPLER}={name}: expected always_on, always_off, traceidratio or parentbased_...")
    text = environment.get(ARGUMENT) or str(DEFAULT_RATIO)
    try:
        ratio = float(text)
    except ValueError:
        ratio = -1.0
    if not 0 <= ratio <= 1:
        raise ValueError(f"{ARGUMENT}={text}: expected a number from 0 to 1")
    return TraceSampler(ratio, by_parent)
