"""The options of ``tidegate deploy``, as one value."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tidegate.cli.api import Doc

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class DeployRequest:
    """A model to serve, its name and its options. ``options`` is a partial DeploymentSpec.

    ``requirements``: the lines of a requirements file. None: the file in the model's folder is used, if it
    exists. ``adapters``: the LoRA adapters of a language model, by name. ``baseline``: a file of training
    data. ``signed``: the file of a cryptographic signature. ``card``: the file of the model card.
    ``samples``: requests that the version must answer during its verification. ``timeout_s``: the longest
    wait in seconds for the verification.
    """

    path: Path
    name: str
    format: str | None = None
    options: Doc = field(default_factory=dict)
    signature: Doc | None = None
    requirements: list[str] | None = None
    metadata: Doc = field(default_factory=dict)
    allow_pickle: bool = False
    trust: list[str] = field(default_factory=list)
    breaking: bool = False
    adapters: Mapping[str, Path] = field(default_factory=dict)
    baseline: Path | None = None
    signed: Path | None = None
    card: Path | None = None
    samples: list[Doc] = field(default_factory=list)
    timeout_s: float = 300.0
