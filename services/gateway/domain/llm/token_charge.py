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
# The most that the prompts of other callers add to a caller's charge. One of them could send unusual prompts.
_MOST_OF_OTHERS = 2.0
# If an estimate is too high, the rest is returned at the end. If it is too low, the limit is exceeded.
_MARGIN = 1.1


@dataclass(slots=True)
class PromptRatio:
    """The ratio of real to estimated prompt tokens, learned from requests that ended.

    Each caller with limits has its own ratio at each endpoint. Before its first request, that of all callers
    counts (caller "").
    """

    ratios: dict[tuple[str, str], float] = field(default_factory=dict)

    def prompt(self, endpoint: str, estimated: int, caller: str = "") -> int:
        """Return a better estimate of a prompt's tokens."""
        ratio = self.ratios.get((endpoint, caller)) if caller else None
        if ratio is None and (others := self.ratios.get((endpoint, ""))) is not None:
            ratio = min(others, _MOST_OF_OTHERS)
        return estimated if ratio is None else math.ceil(estimated * ratio * _MARGIN)

    def learn(self, endpoint: str, estimated: int, counted: int, caller: str = "") -> None:
        """Add a request whose prompt had ``counted`` tokens."""
        if estimated <= 0 or counted <= 0:
            return
        ratio = min(max(counted / estimated, _RATIOS[0]), _RATIOS[1])
        for key in {(endpoint, ""), (endpoint, caller)}:
            before = self.ratios.get(key, ratio)
            # A higher ratio counts at once, so that a change of the prompts does not pass the limit for long.
            self.ratios[key] = max(ratio, before + _WEIGHT * (ratio - before))


def charge(prompt: int, answer: int, *, stated: bool, limits: Mapping[str, TokenAllowance]) -> int:
    """Return the tokens to charge at admission: the prompt and the answer.

    ``stated``: the request itself limits its answer. Otherwise a usual answer is assumed, or a
    shorter one if the limits have less room.
    """
    if stated:
        return prompt + answer
    rooms = [most - prompt for limit in limits.values() for most in (limit.minute, limit.day) if most]
    return prompt + max(0, min([answer, ASSUMED_ANSWER, *rooms]))
