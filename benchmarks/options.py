"""Options that the benchmarks share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import places


def parser(
    doc: str | None, *, seconds: int | None = None, repeats: int | None = None
) -> argparse.ArgumentParser:
    """Return a parser with ``--out``, and with ``--seconds`` and ``--repeats`` if they have a default."""
    found = argparse.ArgumentParser(description=(doc or "").splitlines()[0].partition(": ")[2])
    if seconds is not None:
        found.add_argument("--seconds", type=int, default=seconds, help=f"of each run (default: {seconds})")
    if repeats is not None:
        found.add_argument(
            "--repeats",
            type=int,
            default=repeats,
            help=f"rounds, of which the medians count (default: {repeats})",
        )
    found.add_argument("--out", type=Path, default=places.results_dir(), help="folder for the results")
    return found


def numbers(text: str) -> list[int]:
    """Parse whole numbers such as ``1,16,64``."""
    return [int(part) for part in text.split(",")]


def fractions(text: str) -> list[float]:
    """Parse numbers such as ``0.5,1,2``."""
    return [float(part) for part in text.split(",")]


def names(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Return a parser of comma-separated names from ``known``. It returns them in the order of ``known``."""

    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := [name for name in chosen if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
        return [name for name in known if name in chosen]

    return parse
