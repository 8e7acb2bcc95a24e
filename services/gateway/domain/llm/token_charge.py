"""Choose the tokens to charge for a request before the engine has counted them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from tidegate.kernel.protocol.access import TokenAllowance

# The charge for an answer that the request does not limit. A longer answer is charged more while it grows.
ASSUMED_ANSWER = 256
# The step, in tokens, in which a growing answer is charged.
STEP = 64
# The weight of a new ratio; the earlier ones have the rest.
_WEIGHT = 0.2
_RATIOS = (0.1, 10.0)
# If an estimate is too high, the rest is returned at the end. If it is too low, the limit is exceeded.
_MARGIN = 1.1


@dataclass(slots=True)
class PromptRatio:
    """The ratio of real to estimated prompt tokens of each endpoint, learned from requests that ended."""

    ratios: dict[str, float] = field(default_factory=dict)

    def prompt(self, endpoint: str, estimated: int) -> int:
        """Return a better estimate of a prompt's tokens."""
        ratio = self.ratios.get(endpoint)
        return estimated if ratio is None else math.ceil(estimated * ratio * _MARGIN)

    def learn(self, endpoint: str, estimated: int, counted: int) -> None:
        """Add a request whose prompt had ``counted`` tokens."""
        if estimated <= 0 or counted <= 0:
            return
        ratio = min(max(counted / estimated, _RATIOS[0]), _RATIOS[1])
        before = self.ratios.get(endpoint, ratio)
        # A higher ratio counts immediately: otherwise, changed prompts could exceed the limit for long.
        self.ratios[endpoint] = max(ratio, before + _WEIGHT * (ratio - before))


def charge(prompt: int, answer: int, *, stated: bool, limits: Mapping[str, TokenAllowance]) -> int:
    """Return the tokens to charge at admission: the prompt and the answer.

    ``stated``: the request itself limits its answer. Otherwise a usual answer is assumed, or a
    shorter one if the limits have less room.
    """
    if stated:
        return prompt + answer
    rooms = [most - prompt for limit in limits.values() for most in (limit.minute, limit.day) if most]
    return prompt + max(0, min([answer, ASSUMED_ANSWER, *rooms]))
