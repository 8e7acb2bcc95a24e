"""The gateways' reports about the traffic of each endpoint: outcomes, and histograms of times.

A report has totals since the start of a gateway process, so the next report replaces a lost one.
The functions for histograms are in :mod:`tidegate.kernel.protocol.traffic_histograms`, because every service
imports this module, and the import of numpy takes long.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import orjson
from typing_extensions import Self

# Each of these times of a request has a histogram: the total time, and the parts of the total time.
TOTAL = "total"
LEDGER = ("decode", "transit", "wait", "compute", "encode")
ROWS = (TOTAL, *LEDGER)

# A histogram as a list: the index of the first bucket that is not empty, then the counts from this bucket to
# the last one that is not empty. An empty list means no counts.
SparseRow = list[int]


@dataclass(slots=True)
class EndpointTraffic:
    """One gateway's totals of the requests to an endpoint.

    ``outcomes``: the number of requests with each outcome, which is ``ok`` or the reason of the error.
    ``failed``: the number of requests that failed because of the service (status 500 or more).
    ``times``: for each Deployment, the histograms of the times of its answered requests.
    """

    outcomes: dict[str, int] = field(default_factory=dict)
    failed: int = 0
    times: dict[str, list[SparseRow]] = field(default_factory=dict)


@dataclass(slots=True)
class TrafficReport:
    """The totals of one gateway process, by endpoint.

    ``at``: when the report was made, in seconds since the epoch on the gateway's clock.
    """

    incarnation: str
    at: float
    endpoints: dict[str, EndpointTraffic] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """Return the report as JSON."""
        return orjson.dumps(asdict(self))

    @classmethod
    def from_json(cls, raw: bytes) -> Self:
        """Read a report. Unknown fields of a newer writer are ignored."""
        data = orjson.loads(raw)
        known = EndpointTraffic.__dataclass_fields__
        return cls(
            data["incarnation"],
            data["at"],
            {
                name: EndpointTraffic(**{k: v for k, v in each.items() if k in known})
                for name, each in data["endpoints"].items()
            },
        )
