"""Read which CPU this machine has."""

from __future__ import annotations

import platform
from pathlib import Path


def cpu_model() -> str:
    """Return the name of the CPU's model; its architecture if the kernel does not name the model."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.machine()
