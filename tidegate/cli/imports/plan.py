"""Plan an import: what to deploy, and which parts of the model have an equivalent in Tidegate."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tidegate.cli import output
from tidegate.cli.api import Doc


@dataclass(slots=True)
class ImportPlan:
    """The plan of an import: what to deploy, its options, and a report of the parts of the model.

    ``format``: None if the registry recognises the format. ``options``: the options of the Deployment.
    ``mapped``: each item is a part of the model and its equivalent in Tidegate. ``left``: each item is a part
    that has no equivalent, and the reason. ``pickled``: the reason why ``--allow-pickle`` is needed; empty if
    it is not needed.
    """

    source: str
    path: Path
    name: str
    format: str | None = None
    signature: Doc | None = None
    requirements: list[str] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    mapped: list[tuple[str, str]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)
    pickled: str = ""

    def map(self, there: str, here: str) -> None:
        """Record a part of the model, and its equivalent in Tidegate."""
        self.mapped.append((there, here))

    def leave(self, there: str, why: str) -> None:
        """Record a part of the model without an equivalent in Tidegate, and the reason."""
        self.left.append((there, why))

    def document(self) -> Doc:
        """Return the report as a JSON document."""
        return {
            "source": self.source,
            "name": self.name,
            "format": self.format,
            "signature": self.signature,
            "requirements": self.requirements,
            "metadata": self.metadata,
            "needs_allow_pickle": bool(self.pickled),
            "mapped": [{"from": there, "to": here} for there, here in self.mapped],
            "not_mapped": [{"what": there, "why": why} for there, why in self.left],
        }

    def show(self) -> None:
        """Print the report for people."""
        output.line(f"{self.source} -> model {self.name}")
        for there, here in self.mapped:
            output.line(f"  mapped      {there} -> {here}")
        for there, why in self.left:
            output.line(f"  not mapped  {there}: {why}")
        if self.pickled:
            output.line(f"  needs       --allow-pickle: {self.pickled}")
