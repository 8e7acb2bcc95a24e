"""The cost rates of all Deployments, which the autoscaler writes for the gateways every few seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import orjson
from typing_extensions import Self

from tidegate.kernel.protocol.prices import TokenPrice

# Amounts of single requests are whole numbers of billionths of the currency.
NANOS = 1_000_000_000


class DeploymentCosts(NamedTuple):
    """The cost rates of one Deployment, in billionths of the currency.

    ``nanos_per_us``: the cost of a microsecond of a call that shares its replica with concurrent calls.
    ``alone``: the cost of a microsecond of a call that runs alone in its replica. ``refused``: why the
    Deployment accepts no requests until its budget is renewed; empty: it accepts them. ``until``: the time of
    the renewal, in seconds since the epoch.
    """

    nanos_per_us: float
    refused: str = ""
    until: float = 0.0
    alone: float = 0.0


@dataclass(frozen=True, slots=True)
class CostFacts:
    """The cost rates of Deployments by name, and the prices of a provider's tokens by model."""

    currency: str = "USD"
    deployments: Mapping[str, DeploymentCosts] = field(default_factory=dict)
    tokens: Mapping[str, TokenPrice] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """Return the facts as JSON."""
        tokens = {name: price.model_dump(by_alias=True) for name, price in self.tokens.items()}
        deployments = {name: list(each) for name, each in self.deployments.items()}
        return orjson.dumps({"currency": self.currency, "deployments": deployments, "tokens": tokens})

    @classmethod
    def from_json(cls, raw: bytes) -> Self:
        """Read facts. Ignore fields that a newer version of Tidegate has added."""
        document = orjson.loads(raw)
        places = len(DeploymentCosts._fields)
        return cls(
            document["currency"],
            {name: DeploymentCosts(*each[:places]) for name, each in document["deployments"].items()},
            {name: TokenPrice.model_validate(each) for name, each in document["tokens"].items()},
        )
