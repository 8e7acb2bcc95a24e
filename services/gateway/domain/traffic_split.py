"""Choose a target of an endpoint for each request: rules first, then sticky keys, then weights. Pure.

For the weights, a gateway process chooses the targets of 100 requests at a time. Each target occurs in
proportion to its weight, in random order. Sticky keys use weighted rendezvous hashing (Schindelhauer and
Schomaker, "Weighted Distributed Hash Tables", SPAA 2005). So a changed weight moves as few keys as possible
to another target.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, NamedTuple

BLOCK = 100
# The largest number of endpoints whose drawn targets (``_Blocks``) are in memory. Without this limit, memory
# use would grow with each new name of an endpoint.
_KEPT = 10_000


class Origin(NamedTuple):
    """The facts about a request that rules and sticky keys read.

    ``parameters`` parses the body and returns the request's parameters.
    """

    headers: Mapping[bytes, bytes]
    principal: str
    parameters: Callable[[], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class TrafficRule:
    """A rule that chooses the Deployment of a request by a header, its value, or the caller (``tenant``).

    It applies if every field that is not None matches.
    """

    header: bytes | None
    value: bytes | None
    tenant: str | None

    def matches(self, origin: Origin) -> bool:
        """Return True if the rule applies to a request."""
        if self.tenant is not None and origin.principal != self.tenant:
            return False
        if self.header is None:
            return True
        found = origin.headers.get(self.header)
        return found is not None and self.value in (None, found)


@dataclass(frozen=True, slots=True)
class Sticky:
    """The source of a request's sticky key: a header, a parameter, or the caller."""

    by: str
    name: str = ""
    header: bytes = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "header", self.name.lower().encode("latin-1", "replace"))

    def key(self, origin: Origin) -> bytes | None:
        """Return the sticky key of a request. None: it has no key, so the weights decide."""
        if self.by == "header":
            return origin.headers.get(self.header)
        if self.by == "key":
            return origin.principal.encode() or None
        value = origin.parameters().get(self.name)
        return None if value is None else str(value).encode()


def stay(key: bytes, names: Sequence[str], weights: Sequence[int]) -> int:
    """Return the index of the target for a sticky key.

    The index depends only on the key, the names and the weights, so all gateways choose the same target.
    """
    best, found = -math.inf, 0
    for index, (name, weight) in enumerate(zip(names, weights, strict=True)):
        if weight <= 0:
            continue
        digest = blake2b(key + b"\0" + name.encode(), digest_size=8).digest()
        uniform = (int.from_bytes(digest, "little") + 0.5) / 2**64
        score = -weight / math.log(uniform)
        if score > best:
            best, found = score, index
    return found


class TrafficSplitter:
    """Choose targets at random by weight. Each process draws independently, with its own seed."""

    def __init__(self, seed: int | None = None) -> None:
        self._random = random.Random(seed)
        self._blocks: dict[str, _Blocks] = {}

    def draw(self, endpoint: str, names: tuple[str, ...], weights: tuple[int, ...]) -> int:
        """Return the index of the target for the next request."""
        blocks = self._blocks.get(endpoint)
        if blocks is None or blocks.weights != weights or blocks.names != names:
            if len(self._blocks) >= _KEPT:
                self._blocks.clear()
            blocks = self._blocks[endpoint] = _Blocks(names, weights)
        if not blocks.left:
            blocks.fill(self._random)
        return blocks.left.pop()


class _Blocks:
    """The targets that are drawn for an endpoint's next requests, in blocks of ``BLOCK`` requests.

    A target's share of a block is rounded to a whole number of requests. The rounding error is carried over
    to the next block.
    """

    __slots__ = ("carry", "left", "names", "weights")

    def __init__(self, names: tuple[str, ...], weights: tuple[int, ...]) -> None:
        self.names = names
        self.weights = weights
        self.carry = [0.0] * len(weights)
        self.left: list[int] = []

    def fill(self, rng: random.Random) -> None:
        """Draw the targets of the next block."""
        total = sum(self.weights)
        due = [carry + BLOCK * weight / total for carry, weight in zip(self.carry, self.weights, strict=True)]
        counts = [math.floor(each + 1e-9) for each in due]
        # After rounding down, some requests have no target yet. They go to the targets with the largest
        # fractional parts. Targets with equal parts are in random order.
        order = sorted(range(len(due)), key=lambda i: (counts[i] - due[i], rng.random()))
        for index in order[: BLOCK - sum(counts)]:
            counts[index] += 1
        self.carry = [each - count for each, count in zip(due, counts, strict=True)]
        self.left = [index for index, count in enumerate(counts) for _ in range(count)]
        rng.shuffle(self.left)
