"""Turn a Deployment's ``scaling`` into numbers. Unset values come from the preset of its aggressiveness."""

from __future__ import annotations

from dataclasses import dataclass

from services.autoscaler.domain.snapshot import Policy
from tidegate.kernel.protocol.models import Deployment
from tidegate.kernel.protocol.scaling import Aggressiveness


@dataclass(frozen=True, slots=True)
class Tuning:
    """Every number that the target depends on. Times are seconds unless said otherwise.

    ``utilization`` is the share of time that a replica may be busy. ``by_utilization`` is True if the
    Deployment sets this share; then the measured utilization counts as well. A trend is extended into the
    future by ``ahead`` times a replica's start time. If ``panic_factor`` is 0, a panic never begins. If
    ``impatient`` is True, the target grows even if the queue will be empty before a new replica is ready.
    """

    wait_ms: float
    utilization: float
    by_utilization: bool
    backlog_per_replica: float | None
    up_window_s: float
    down_window_s: float
    idle_s: float
    max_up_per_minute: int | None
    max_down_per_minute: int | None
    panic_factor: float
    ahead: float
    impatient: bool


@dataclass(frozen=True, slots=True)
class Preset:
    """The values of one level of aggressiveness.

    ``wait`` is a factor of the Deployment's target wait. ``down`` and ``idle`` are factors of the service's
    settings for the down window and the idle time.
    """

    wait: float
    utilization: float
    up_window_s: float
    down: float
    idle: float
    panic_factor: float
    ahead: float
    impatient: bool = False


PRESETS: dict[Aggressiveness, Preset] = {
    "economy": Preset(
        wait=2.0, utilization=0.9, up_window_s=5.0, down=0.5, idle=0.5, panic_factor=3.0, ahead=0.0
    ),
    "balanced": Preset(
        wait=1.0, utilization=0.8, up_window_s=0.0, down=1.0, idle=1.0, panic_factor=2.0, ahead=1.0
    ),
    "latency": Preset(
        wait=0.5,
        utilization=0.6,
        up_window_s=0.0,
        down=4.0,
        idle=5.0,
        panic_factor=1.5,
        ahead=1.5,
        impatient=True,
    ),
}


def tuning(deployment: Deployment, policy: Policy, start_s: float = 0.0) -> Tuning:
    """Return a Deployment's own values. Unset values follow from its aggressiveness and ``policy``.

    The default down window and the default idle time last at least ``start_s``, the time that a new replica
    takes to start.
    """
    scaling = deployment.scaling
    preset = PRESETS[scaling.aggressiveness]
    return Tuning(
        wait_ms=deployment.target_wait_ms * preset.wait,
        utilization=_or(scaling.target_utilization, preset.utilization),
        by_utilization=scaling.target_utilization is not None,
        backlog_per_replica=scaling.backlog_per_replica,
        up_window_s=_or(scaling.up_window_s, preset.up_window_s),
        down_window_s=_or(scaling.down_window_s, max(start_s, policy.down_window_s * preset.down)),
        idle_s=_or(deployment.scale_to_zero_after_s, max(start_s, policy.idle_s * preset.idle)),
        max_up_per_minute=scaling.max_up_per_minute,
        max_down_per_minute=scaling.max_down_per_minute,
        panic_factor=_or(scaling.panic_factor, preset.panic_factor),
        ahead=preset.ahead,
        impatient=preset.impatient,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
