"""Arrivals to replay, as sorted seconds from the start: synthetic, from a file, or recorded."""

from __future__ import annotations

import csv
import io
import math
import random
from collections.abc import Callable, Mapping
from datetime import datetime
from itertools import pairwise
from statistics import median
from typing import Literal

from tidegate.kernel.errors import BadRequest

Shape = Literal["constant", "step", "ramp", "spike", "diurnal", "workday", "bursty"]

MOST = 3_000_000
DAY_S = 86_400.0
OPEN_S = (9 * 3600.0, 17 * 3600.0)
BURST_S = (20.0, 100.0)  # mean seconds of a burst, and of the pause between two bursts


def synthetic(shape: Shape, *, rps: float, factor: float, seconds: float, seed: int) -> list[float]:
    """Return random arrivals (a Poisson process) at a rate that follows ``shape``.

    Thirds and fifths are parts of ``seconds``. "High" means ``factor`` times ``rps``. The rate of each shape:

    - ``constant``: ``rps``.
    - ``step``: ``rps`` in the first third, then high.
    - ``ramp``: it rises from ``rps`` to high in the first two thirds, then it stays high.
    - ``spike``: high in the third fifth, ``rps`` before and after.
    - ``diurnal``: ``rps`` at midnight, high at noon, with a smooth change between them.
    - ``workday``: high from 9:00 to 17:00, else ``rps``. It rises within a minute and falls within a minute.
    - ``bursty``: high in bursts of 20 s on average; ``rps`` in the pauses, 100 s on average.

    Raise BadRequest for too many arrivals.
    """
    draw = random.Random(seed)
    rate = _rates(shape, rps, factor, seconds, draw)
    highest = rps * max(1.0, factor)
    if highest * seconds > MOST:
        raise _too_many(highest * seconds)
    found, at = [], 0.0
    while highest > 0:  # thinning (Lewis and Shedler): draw at the highest rate, drop a random part
        at += draw.expovariate(highest)
        if at >= seconds:
            break
        if draw.random() * highest < rate(at):
            found.append(at)
    return found


def from_csv(text: str) -> list[float]:
    """Return the arrivals of a CSV file.

    Each line has the time of one request, or a time and a number of requests. These requests are spread
    evenly over the time until the next line. Times are seconds from any start, or ISO dates. A header line is
    skipped. Raise BadRequest if the file is not valid; the message names the line.
    """
    rows = [(number, row) for number, row in enumerate(csv.reader(io.StringIO(text)), start=1) if row]
    if rows and not _is_time(rows[0][1][0]):
        rows = rows[1:]
    if not rows:
        raise BadRequest("The file has no arrivals. Lines of `time` or `time,count` are expected.")
    parsed = [(_time(row[0], number), _count(row, number)) for number, row in rows]
    parsed.sort()
    if sum(count for _, count in parsed) > MOST:
        raise _too_many(sum(count for _, count in parsed))
    start = parsed[0][0]
    gaps = [b[0] - a[0] for a, b in pairwise(parsed)]
    # No line follows the last line, so spread its requests over the median gap between lines.
    usual = median([gap for gap in gaps if gap > 0] or [1.0])
    return [
        at - start + gap * place / count
        for (at, count), gap in zip(parsed, [*gaps, usual], strict=True)
        for place in range(count)
    ]


def recorded(by_second: Mapping[int, int], since: int) -> list[float]:
    """Return recorded arrivals, spread evenly over each second."""
    if sum(by_second.values()) > MOST:
        raise _too_many(sum(by_second.values()))
    return [
        second - since + place / count
        for second, count in sorted(by_second.items())
        for place in range(count)
    ]


def _rates(
    shape: Shape, rps: float, factor: float, seconds: float, draw: random.Random
) -> Callable[[float], float]:
    match shape:
        case "constant":
            return lambda at: rps
        case "step":
            return lambda at: rps * (factor if at >= seconds / 3 else 1.0)
        case "ramp":
            return lambda at: rps * (1.0 + (factor - 1.0) * min(1.0, at / (seconds * 2 / 3)))
        case "spike":
            return lambda at: rps * (factor if seconds * 0.4 <= at < seconds * 0.6 else 1.0)
        case "diurnal":
            return lambda at: rps * (1.0 + (factor - 1.0) * (1 - math.cos(2 * math.pi * at / DAY_S)) / 2)
        case "workday":
            return lambda at: rps * (1.0 + (factor - 1.0) * _open(at % DAY_S))
        case "bursty":
            return _bursts(rps, factor, seconds, draw)


def _open(second: float) -> float:
    """Return the share of the additional load at a second of the day: 1 in working hours, 0 at night."""
    return max(0.0, min(1.0, (second - OPEN_S[0]) / 60.0, (OPEN_S[1] - second) / 60.0))


def _bursts(rps: float, factor: float, seconds: float, draw: random.Random) -> Callable[[float], float]:
    edges, at = [0.0], 0.0
    while at < seconds:
        at += draw.expovariate(1 / BURST_S[1 if len(edges) % 2 else 0])
        edges.append(at)
    place = 0

    def rate(at: float) -> float:
        nonlocal place
        while place + 1 < len(edges) and edges[place + 1] <= at:
            place += 1
        return rps * (factor if place % 2 else 1.0)

    return rate


def _is_time(text: str) -> bool:
    try:
        _time(text, 0)
    except BadRequest:
        return False
    return True


def _time(text: str, line: int) -> float:
    try:
        found = float(text)
    except ValueError:
        try:
            found = datetime.fromisoformat(text.strip()).timestamp()
        except ValueError:
            raise BadRequest(
                f"Line {line}: {text[:40]!r} is neither a number of seconds nor a date."
            ) from None
    if not math.isfinite(found):
        raise BadRequest(f"Line {line}: {text[:40]!r} is not a finite time.")
    return found


def _count(row: list[str], line: int) -> int:
    if len(row) < 2 or not row[1].strip():
        return 1
    try:
        count = float(row[1])
    except ValueError:
        raise BadRequest(f"Line {line}: {row[1][:40]!r} is not a number of requests.") from None
    if not 0 <= count <= MOST:
        raise BadRequest(f"Line {line}: {row[1][:40]!r} is not a number of requests from 0 to {MOST:,}.")
    return round(count)


def _too_many(count: float) -> BadRequest:
    return BadRequest(
        f"{count:,.0f} requests are too many to replay (at most {MOST:,}). Choose a shorter period."
    )
