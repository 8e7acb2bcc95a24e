"""A hostile file and what must come of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Case:
    """A file that the registry must refuse.

    ``make`` makes its bytes. ``words``: a regular expression for the message. ``more``: further fields of the
    registration. ``statuses``: those that are right. ``slow``: the registry needs seconds to reach its limit.
    """

    name: str
    filename: str
    make: Callable[[], bytes]
    words: str
    more: Mapping[str, Any] = field(default_factory=dict)
    statuses: tuple[int, ...] = (400,)
    slow: bool = False


def raw(data: bytes) -> Callable[[], bytes]:
    """Return a maker of these bytes."""
    return lambda: data
