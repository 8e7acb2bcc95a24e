"""Find the degrees of containment that this machine allows for a model's processes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

# The bit numbers of Linux capabilities in the mask CapEff of /proc/self/status (from linux/capability.h).
CAPABILITIES = {"CHOWN": 0, "DAC_OVERRIDE": 1, "FOWNER": 3, "KILL": 5, "SETGID": 6, "SETUID": 7}
SYS_ADMIN = 21


@dataclass(frozen=True, slots=True)
class Degree:
    """A degree of containment: a separate user for the model, separate mounts, both, or neither."""

    user: bool = False
    mounts: bool = False


NONE = Degree()


def possible() -> tuple[list[Degree], str]:
    """Return the degrees that this process may try, strongest first, and a reason.

    The reason says why a separate user is impossible. It is empty if a separate user is possible.
    """
    if os.geteuid() != 0:
        return [Degree(mounts=True), NONE], "the worker does not run as root"
    effective = _capabilities()
    missing = [name for name, bit in CAPABILITIES.items() if not effective >> bit & 1]
    if missing:
        return [NONE], f"the worker lacks the capabilities {', '.join(missing)}"
    degrees = [Degree(user=True), NONE]
    return [Degree(user=True, mounts=True), *degrees] if effective >> SYS_ADMIN & 1 else degrees, ""


def _capabilities() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1], 16) for line in lines if line.startswith("CapEff:"))
