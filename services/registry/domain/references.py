"""Parse references to versions: ``digits@3``, ``digits@champion``, ``digits@latest``, ``digits``. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from services.registry.domain import names
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol import names as protocol_names

LATEST = "latest"
LARGEST = 2**31 - 1
LONGEST_ALIAS = 32


@dataclass(frozen=True, slots=True)
class Reference:
    """A reference to a version by number or by alias; if both are None, to the latest version."""

    model: str
    number: int | None = None
    alias: str | None = None


def parse(text: str) -> Reference:
    """Parse a reference such as ``NAME@3``. Raise BadRequest for an invalid reference."""
    model, at, version = text.partition("@")
    names.check("model", model)
    if at and not version:
        raise BadRequest(f"{text!r} has no version after the @. Write NAME@3, NAME@ALIAS or NAME@latest.")
    return of_version(model, version or LATEST)


def of_version(model: str, version: str) -> Reference:
    """Return the reference to a version of a model. ``version``: a number, an alias or ``latest``."""
    if version == LATEST:
        return Reference(model)
    bare = version[1:] if version[:1] == "v" and version[1:].isdecimal() else version
    if bare.isdecimal() and bare.isascii():
        number = int(bare[:12])
        if not 1 <= number <= LARGEST:
            raise BadRequest(f"{version[:20]!r} is not a version. Versions are numbers: 1, 2, 3 and so on.")
        return Reference(model, number=number)
    return Reference(model, alias=check_alias(version))


def check_alias(alias: str) -> str:
    """Return ``alias``. Raise BadRequest if it is invalid, or if it looks like a version number."""
    if protocol_names.problem("alias", alias) is not None:
        raise BadRequest(f"{alias[:80]!r} is not a valid name of an alias: {protocol_names.RULE}.")
    if len(alias) > LONGEST_ALIAS:
        raise BadRequest(f"The alias has {len(alias)} characters, but the limit is {LONGEST_ALIAS}.")
    if alias == LATEST:
        raise BadRequest("'latest' always means the latest version, so it cannot be set as an alias.")
    if alias.removeprefix("v").isdecimal():
        raise BadRequest(f"{alias!r} looks like the number of a version. Begin the alias with a word.")
    return alias
