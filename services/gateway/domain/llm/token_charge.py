"""Choose how many tokens to charge for a request before the engine has counted them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from tidegate.kernel.protocol.access import TokenAllowance

# The tokens that are charged at first for an answer without a limit. If the answer becomes longer, more
# tokens are charged in steps.
ASSUMED_ANSWER = 256
# A growing answer is charged in steps of this many tokens.
STEP = 64
# The weight of the newest request in PromptRatio's moving average.
_WEIGHT = 0.2
_RATIOS = (0.1, 10.0)
# A new caller starts with the ratio of all callers. If that ratio is larger than this value, the caller
# starts with this value. Otherwise, one caller with unusual prompts could raise the charges of all new
# callers.
_MOST_OF_OTHERS = 2.0
# Corrected estimates are multiplied by this factor, because a charge that is too low lets a caller exceed the
# limit. A charge that is too high is corrected when the answer ends.
_MARGIN = 1.1


@dataclass(slots=True)
class PromptRatio:
    """The ratio of real to estimated prompt tokens, learned from requests that ended.

    Each caller with limits has its own ratio at each endpoint. Until the caller's first request at an
    endpoint ends, the endpoint's ratio of all callers is used. This ratio is stored for the caller ``""``.
    """

    ratios: dict[tuple[str, str], float] = field(default_factory=dict)

    def prompt(self, endpoint: str, estimated: int, caller: str = "") -> int:
        """Return a prompt's estimated tokens, corrected by the ratio of real to estimated tokens."""
        ratio = self.ratios.get((endpoint, caller)) if caller else None
        if ratio is None and (others := self.ratios.get((endpoint, ""))) is not None:
            ratio = min(others, _MOST_OF_OTHERS)
        return estimated if ratio is None else math.ceil(estimated * ratio * _MARGIN)

    def learn(self, endpoint: str, estimated: int, counted: int, caller: str = "") -> None:
        """Update the ratios after a request.

        ``estimated``: the estimated tokens of its prompt. ``counted``: the tokens that the engine counted.
        """
        if estimated <= 0 or counted <= 0:
            return
        ratio = min(max(counted / estimated, _RATIOS[0]), _RATIOS[1])
        for key in {(endpoint, ""), (endpoint, caller)}:
            before = self.ratios.get(key, ratio)
            # A higher ratio applies immediately. If it were averaged, a caller whose prompts have more tokens
            # than estimated could exceed the limit for long.
            self.ratios[key] = max(ratio, before + _WEIGHT * (ratio - before))


def charge(prompt: int, answer: int, *, stated: bool, limits: Mapping[str, TokenAllowance]) -> int:
    """Return how many tokens to charge at admission, for the prompt and the answer together.

    ``prompt``, ``answer``: the estimated tokens. ``stated``: True if the request itself limits its answer. If
    not, charge at most ``ASSUMED_ANSWER`` tokens for the answer, or fewer if ``limits`` allow only fewer.
    """
    if stated:
        return prompt + answer
    rooms = [most - prompt for limit in limits.values() for most in (limit.minute, limit.day) if most]
    return prompt + max(0, min([answer, ASSUMED_ANSWER, *rooms]))
