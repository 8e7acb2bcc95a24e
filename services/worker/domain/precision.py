"""Judge how well a quantized model runs on this worker's CPU. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tidegate.kernel.precision.cpu import Cpu
from tidegate.kernel.precision.embedded import Precision
from tidegate.kernel.precision.loss import likeness


def loss_here(precision: Precision, expected: Mapping[str, Any], actual: Mapping[str, Any]) -> float | None:
    """Return how far the answers on this CPU (``actual``) are from the expected ones; 0 means equal.

    None means that they cannot be compared.
    """
    wanted, found = expected.get(precision.output), actual.get(precision.output)
    if wanted is None or found is None or not len(wanted):
        return None
    return max(0.0, 1.0 - likeness(precision.measure, wanted, found))


def report(precision: Precision, here: Cpu, loss: float | None, rows: int, call_ms: float | None) -> str:
    """Return a text with the measured loss and time on this CPU, and a warning if the CPU is unsuitable."""
    parts = [f"int8 ({precision.recipe})"]
    if loss is not None and call_ms is not None:
        parts.append(f"measured here: loss {loss:.2%} on {rows} rows, {call_ms:.3g} ms a call")
    warning = problem(precision, here, loss, rows)
    return "; ".join([*parts, *([warning] if warning else [])])


def problem(precision: Precision, here: Cpu, loss: float | None, rows: int) -> str:
    """Return why this CPU does not suit the model, and what to do; empty if the CPU suits it."""
    again = "deploy it again with --precision on a CPU like this one"
    # With few samples, a single wrong row already exceeds a small limit. So one wrong row is allowed.
    if loss is not None and loss > precision.max_loss and loss * rows > 1.5:
        return f"WARNING: this is above the accepted loss of {precision.max_loss:.2%}: {again}"
    if precision.full_range and not here.exact:
        return (
            f"WARNING: {here.name} has no VNNI, so sums of 8-bit products saturate here. The recipe was "
            f"chosen on {precision.cpu}: {again}, or make the model with `tidegate quantize --portable`"
        )
    missing = [flag for flag in precision.flags if flag not in here.flags]
    if missing:
        return f"this CPU lacks {', '.join(missing)}, which {precision.cpu} had: the model may be slower here"
    return ""
