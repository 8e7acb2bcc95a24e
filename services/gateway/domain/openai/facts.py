"""The facts about a batch that exist only for OpenAI's API. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class OpenAiFacts:
    """The caller's request for a batch, and the ids of the batch's files.

    ``expires_ms``: the end of the batch's completion window (ms since the epoch).
    """

    input_file: bytes
    output_file: bytes
    error_file: bytes
    endpoint: str
    window: str
    expires_ms: int
    metadata: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the facts as JSON, for the batch's record."""
        return {
            "input_file": self.input_file.hex(),
            "output_file": self.output_file.hex(),
            "error_file": self.error_file.hex(),
            "endpoint": self.endpoint,
            "window": self.window,
            "expires_ms": self.expires_ms,
            "metadata": self.metadata,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> OpenAiFacts:
        """Read the facts from the batch's record."""
        ids = {name: bytes.fromhex(document[name]) for name in ("input_file", "output_file", "error_file")}
        return cls(**{**document, **ids})
