"""Add up the counts of an endpoint's shadow traffic from all gateways, even ended ones. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tidegate.kernel.protocol.presence import GatewayReport
from tidegate.kernel.protocol.shadow import ShadowCounts

# If more gateway processes than this are known, the totals of ended processes are moved to
# ``ShadowWatch.past``.
GATEWAYS_KEPT = 64


@dataclass(slots=True)
class ShadowWatch:
    """The counts of one shadow, by gateway process.

    ``seen``: the last totals of each gateway process. ``past``: the sum of totals that were removed from
    ``seen``, because the process ended or its counts began again at 0.
    """

    key: str
    seen: dict[str, ShadowCounts] = field(default_factory=dict)
    past: ShadowCounts = field(default_factory=ShadowCounts)

    def observe(self, endpoint: str, reports: Iterable[GatewayReport]) -> None:
        """Store the gateways' current totals."""
        present = set()
        for report in reports:
            present.add(report.incarnation)
            counts = report.shadows.get(endpoint)
            if counts is None or counts.key != self.key:
                continue
            before = self.seen.get(report.incarnation)
            if before is not None and before.offered > counts.offered:
                self.past.add(before)  # the shadow was stopped and started, so its counts began at 0
            self.seen[report.incarnation] = counts
        if len(self.seen) > GATEWAYS_KEPT:
            for incarnation in self.seen.keys() - present:
                self.past.add(self.seen.pop(incarnation))

    def total(self) -> ShadowCounts:
        """Return the sum of the counts of all gateways."""
        total = ShadowCounts(self.key)
        for counts in (self.past, *self.seen.values()):
            total.add(counts)
        return total

    def to_json(self) -> dict[str, Any]:
        """Return the counts as a document."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> ShadowWatch:
        """Read the result of :meth:`to_json`. Raise KeyError or TypeError if it is malformed."""
        seen = {name: ShadowCounts.of(each) for name, each in document["seen"].items()}
        return cls(document["key"], seen, ShadowCounts.of(document["past"]))
