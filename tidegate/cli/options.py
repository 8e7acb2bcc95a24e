"""Options and arguments that several commands share, and the parsing of their values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any

import typer

from tidegate.cli.exit_codes import UsageError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, messages on stderr.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="An endpoint's or a deployment's name.")]
Model = Annotated[str, typer.Argument(metavar="NAME", help="The model's name.")]
Limit = Annotated[int, typer.Option("--limit", "-n", min=1, help="Number of latest entries to show.")]
Reference = Annotated[
    str,
    typer.Argument(metavar="NAME[@VERSION]", help="A version: NAME@3, NAME@ALIAS, or NAME for the latest."),
]
Filter = Annotated[
    str | None,
    typer.Option(
        "--filter", metavar="FILTER", help="Conditions: 'metrics.accuracy > 0.9 and tags.team = fraud'."
    ),
]
OrderBy = Annotated[
    str | None, typer.Option("--order-by", metavar="NAME", help="'metrics.accuracy desc', 'created', ...")
]

_STICKY = ("header", "parameter", "key")
_UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def seconds(text: str) -> float:
    """Parse ``90``, ``90s``, ``5m``, ``2h`` or ``1d`` as seconds. Raise UsageError for other texts."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)?", text.strip())
    if found is None:
        raise UsageError(f"{text!r} is not a duration: write 90, 90s, 5m, 2h or 1d.")
    return float(found[1]) * _UNITS[found[2] or ""]


def parsed(text: str) -> datetime:
    """Parse an ISO 8601 time, also with ``Z``, which Python 3.10 cannot parse.

    Raise ValueError for other texts.
    """
    return datetime.fromisoformat(f"{text[:-1]}+00:00" if text.endswith(("Z", "z")) else text)


def pairs(option: str, values: Sequence[str] | None) -> dict[str, str]:
    """Parse ``K=V`` options as a dict. Raise UsageError for an option without ``=`` or without a key."""
    found = {}
    for value in values or ():
        key, equals, rest = value.partition("=")
        if not equals or not key:
            raise UsageError(f"{option} {value!r}: write {option} KEY=VALUE.")
        found[key] = rest
    return found


def numbers(option: str, values: Sequence[str] | None) -> dict[str, float]:
    """Parse ``K=NUMBER`` options as a dict. Raise UsageError for any other option."""
    found = {}
    for key, value in pairs(option, values).items():
        try:
            found[key] = float(value)
        except ValueError:
            raise UsageError(f"{option} {key}={value}: {value!r} is not a number.") from None
    return found


def parse_sticky(text: str) -> dict[str, Any] | None:
    """Parse the source of sticky keys: ``header:NAME``, ``parameter:NAME``, ``key`` or ``none``.

    Return None for ``none``. Raise UsageError for other texts.
    """
    if text == "none":
        return None
    by, _, name = text.partition(":")
    if by not in _STICKY or (by == "key") != (not name):
        raise UsageError(f"--sticky {text!r}: write header:NAME, parameter:NAME, key or none.")
    return {"by": by, "name": name or None}
