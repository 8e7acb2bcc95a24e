"""The resident memory of the stack on this machine, for ``up`` and ``status``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tidegate.cli import output
from tidegate.cli.api import Doc

if TYPE_CHECKING:
    from tidegate.kernel.settings.base import Settings
    from tidegate.stack.record import StackRecord


def memory_of(found: Settings, record: StackRecord) -> Doc | None:
    """Return the resident memory of each part of the stack and the sum, in bytes.

    Return None if the memory cannot be read.
    """
    from dataclasses import asdict

    from tidegate.stack import memory

    parts = memory.of_stack(record, found.state_path)
    return {"pss": memory.total(parts), "parts": [asdict(part) for part in parts]} if parts else None


def show_memory(document: Doc | None) -> None:
    """Print the stack's memory in one line: the sum and the parts."""
    if document is None:
        return
    parts = ", ".join(f"{part['name']} {part['pss'] / 2**20:.0f}" for part in document["parts"])
    output.line(f"Memory: {document['pss'] / 2**20:.0f} MiB resident ({parts}).")
