"""The edit distance of two strings (Myers, "A fast bit-vector algorithm", JACM 1999). Pure.

Two integers with one bit per character store a column of the distance table. So a column is computed in a few
operations, whatever its length. This variant is by Hyyrö (2003).
"""

from __future__ import annotations

from collections.abc import Callable

PAUSE_EVERY = 64


def edit_distance(a: str, b: str, pause: Callable[[], None] = lambda: None) -> int:
    """Return the least number of changes that turn ``a`` into ``b``.

    A change inserts, deletes or replaces one character. ``pause`` is called every ``PAUSE_EVERY`` characters,
    so that other threads can run.
    """
    if not a or not b:
        return len(a) + len(b)
    places: dict[str, int] = {}
    for index, character in enumerate(a):
        places[character] = places.get(character, 0) | 1 << index
    mask, last = (1 << len(a)) - 1, 1 << len(a) - 1
    up, down, distance = mask, 0, len(a)
    for index, character in enumerate(b):
        if index % PAUSE_EVERY == 0:
            pause()
        same = places.get(character, 0)
        diagonal = (((same & up) + up) ^ up) | same | down
        right = down | ~(diagonal | up) & mask
        left = up & diagonal
        if right & last:
            distance += 1
        elif left & last:
            distance -= 1
        right = right << 1 | 1
        up = (left << 1 | ~(diagonal | right)) & mask
        down = right & diagonal & mask
    return distance
