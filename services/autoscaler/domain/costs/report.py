"""Make a cost report from booked amounts, by Deployment, version, endpoint or key.

The report includes unused time. Only busy time belongs to an endpoint and a key. The rest of a Deployment's
cost is its overhead: start-up, idle and wasted time. The overhead is divided among endpoints or keys in
proportion to their busy time. So the items always add up to the total.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from services.autoscaler.domain.costs.lives import HOUR_S, NS, OBSERVED, Amount, Life, Place
from tidegate.kernel.protocol.prices import PriceList
from tidegate.kernel.protocol.replica_time import BUSY, IDLE, Part, Spent

By = Literal["deployment", "version", "endpoint", "key"]
# The name of the item for the costs of Deployments that had no request in the period.
UNUSED = "(unused)"
# Replica time that no worker's report covers yet. The next report says how this time was used.
PENDING = "pending"

Row = tuple[Place, Amount]


@dataclass(slots=True)
class Item:
    """The sums of one item of a report (such as a Deployment), or of the whole report.

    ``direct`` is the cost of the item's calls. ``overhead`` is the item's share of the other costs.
    """

    direct: float = 0.0
    overhead: float = 0.0
    token_cost: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    requests: int = 0
    rows: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    tokens_cached: int = 0

    def add(self, part: str, amount: Amount) -> None:
        """Add a booked amount."""
        spent = amount.spent
        self.seconds[part] += spent.ns / NS
        self.token_cost += amount.token_cost
        if part == BUSY:
            self.direct += amount.cost
            self.requests += spent.requests
            self.rows += spent.rows
            self.tokens_in += spent.tokens_in
            self.tokens_out += spent.tokens_out
            self.tokens_cached += spent.tokens_cached
        else:
            self.overhead += amount.cost

    def view(self) -> dict[str, Any]:
        """Return the sums for JSON, with the costs per 1,000 requests and per 1,000 tokens."""
        cost, tokens = self.direct + self.overhead + self.token_cost, self.tokens_in + self.tokens_out
        return {
            "cost": cost,
            "direct": self.direct,
            "overhead": self.overhead,
            "token_cost": self.token_cost,
            "seconds": dict(self.seconds),
            "requests": self.requests,
            "rows": self.rows,
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
            "tokens_cached": self.tokens_cached,
            "per_1000_requests": 1000 * cost / self.requests if self.requests else None,
            "per_1000_tokens": 1000 * cost / tokens if tokens else None,
        }


def pending_rows(lives: Iterable[Life]) -> list[Row]:
    """Return rows with the replica time that no worker's report covers yet."""
    found: list[Row] = []
    for life in lives:
        hour = int(life.booked_at // HOUR_S) * HOUR_S
        spent = Spent(life.pending_ns)
        for part, amount in (
            (Part(PENDING), Amount(spent, life.rate.cost(spent.ns))),
            (Part(OBSERVED), Amount(Spent(life.unobserved_ns))),
        ):
            found.append((Place(hour, life.deployment, life.model, life.version, part), amount))
    return found


def report(rows: Sequence[Row], by: By, prices: PriceList) -> dict[str, Any]:
    """Return the costs and times of a period: the total, the items, and the sums by kind of time.

    ``by``: whether an item is a Deployment, a version, an endpoint or a key. In the result,
    ``observed_seconds`` says how long replicas ran, as the launcher saw it. ``managed`` is the cost of the
    same work at managed services.
    """
    observed = sum(amount.spent.ns for place, amount in rows if place.part.kind == OBSERVED) / NS
    parts = [(place, amount) for place, amount in rows if place.part.kind != OBSERVED]
    total = Item()
    sums: dict[str, Amount] = {}
    for place, amount in parts:
        total.add(place.part.kind, amount)
        name = f"wasted: {place.part.detail}" if place.part.detail else place.part.kind
        sums[name] = sums[name].plus(amount) if name in sums else amount
    accounted = sum(total.seconds.values())
    items = _items(parts, by)
    return {
        "currency": prices.currency,
        "by": by,
        "total": total.view(),
        "parts": [
            {"part": name, "seconds": amount.spent.ns / NS, "cost": amount.cost}
            for name, amount in sorted(sums.items(), key=lambda each: -each[1].spent.ns)
        ],
        "items": [
            {by: name, **item.view()}
            for name, item in sorted(items.items(), key=lambda each: -each[1].direct - each[1].overhead)
        ],
        "replica_seconds": accounted,
        "observed_seconds": observed,
        "managed": _managed(total, accounted, prices),
    }


def _items(parts: Sequence[Row], by: By) -> dict[str, Item]:
    items: dict[str, Item] = defaultdict(Item)
    if by in ("deployment", "version"):
        for place, amount in parts:
            items[_group(place, by)].add(place.part.kind, amount)
        return items
    busy: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    others: list[Row] = []
    for place, amount in parts:
        if place.part.kind == BUSY:
            name = _group(place, by)
            items[name].add(BUSY, amount)
            busy[place.deployment][name] += amount.spent.ns
        else:
            others.append((place, amount))
    for place, amount in others:
        users: Mapping[str, float] = busy.get(place.deployment) or {UNUSED: 1.0}
        whole = sum(users.values())
        for name, ns in users.items():
            share = ns / whole if whole else 1 / len(users)
            items[name].overhead += amount.cost * share
            items[name].seconds[place.part.kind] += amount.spent.ns / NS * share
    return items


def _group(place: Place, by: By) -> str:
    if by == "version":
        return f"{place.model}:{place.version}" if place.model else place.deployment
    if by == "deployment":
        return place.deployment
    return (place.part.endpoint if by == "endpoint" else place.part.caller) or "(unknown)"


def _managed(total: Item, replica_s: float, prices: PriceList) -> list[dict[str, Any]]:
    """Return the cost of the same replicas, requests and tokens at the listed managed services."""
    found = []
    for name, each in prices.managed.items():
        cost = each.per_replica_hour * replica_s / 3600 + each.per_million_requests * total.requests / 1e6
        cost += each.per_million_tokens_in * total.tokens_in / 1e6
        cost += each.per_million_tokens_out * total.tokens_out / 1e6
        found.append({"service": name, "cost": cost})
    return found


def idle_per_month(parts: Sequence[Mapping[str, Any]], covered_s: float) -> float | None:
    """Return what idle time would cost in 30 days, from its cost in ``covered_s`` seconds.

    ``parts`` are the parts of a report. Return None if ``covered_s`` is less than an hour.
    """
    if covered_s < HOUR_S:
        return None
    idle = sum(each["cost"] for each in parts if each["part"] == IDLE)
    return float(idle * 30 * 86_400 / covered_s)
