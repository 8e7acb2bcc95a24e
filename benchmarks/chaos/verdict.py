"""The verdict: compare the client's list with records, results and webhooks. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TERMINAL = ("succeeded", "failed", "cancelled", "expired")
SHOWN = 5

Doc = dict[str, Any]


def inputs_of(number: int) -> list[float]:
    """Return the input and expected output of job ``number``: unique, and exact as FP32."""
    return [float(number), float(number % 997), float(-number), 0.5]


@dataclass(slots=True)
class Evidence:
    """All observations. ``told``: ids of the 202s by number; ``results``: outputs or errors;
    ``webhook_ids``: ids of the received webhooks by job; ``deliveries``: how often each was received.
    """

    jobs: int
    told: Mapping[int, set[str]]
    records: list[Doc]
    results: Mapping[int, Any]
    webhook_ids: Mapping[str, set[str]]
    deliveries: Counter[str]
    forged: int
    gauge: Counter[str]
    gauge_last: float
    ledger: Doc = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Bar:
    """One required result. ``wrong``: examples that contradict it."""

    text: str
    wrong: list[str]

    @property
    def met(self) -> bool:
        """True if no example contradicts the bar."""
        return not self.wrong


def judge(seen: Evidence) -> list[Bar]:
    """Return every bar."""
    ids = {id_ for ids in seen.told.values() for id_ in ids}
    records = Counter(record["id"] for record in seen.records)
    states = {record["id"]: record["status"] for record in seen.records}
    numbers = {id_: number for number, told in seen.told.items() for id_ in told}
    return [
        Bar(
            f"every one of {seen.jobs:,} jobs was acknowledged, under one id",
            [f"{n}: {seen.told.get(n)}" for n in range(seen.jobs) if len(seen.told.get(n, ())) != 1],
        ),
        Bar(
            "the client's list of 202s and the records name the same jobs, once each",
            [f"not recorded: {id_}" for id_ in ids - records.keys()]
            + [f"never acknowledged: {id_}" for id_ in records.keys() - ids]
            + [f"{count} records: {id_}" for id_, count in records.items() if count != 1],
        ),
        Bar(
            "every job is over",
            [f"{id_}: {states[id_]}" for id_ in ids & states.keys() if states[id_] not in TERMINAL],
        ),
        Bar(
            "the store counts every job once: accepted, and over",
            _miscounted(seen),
        ),
        Bar(
            "every result is right",
            [
                f"{number}: {str(seen.results.get(number))[:200]}"
                for number in numbers.values()
                if seen.results.get(number) != inputs_of(number)
            ],
        ),
        Bar(
            "every job has sent its webhook under exactly one webhook id",
            [
                f"{id_}: {sorted(seen.webhook_ids.get(id_, ()))}"
                for id_ in ids
                if len(seen.webhook_ids.get(id_, ())) != 1
            ]
            + [f"of no job: {id_}" for id_ in seen.webhook_ids.keys() - ids]
            + (["signatures that were wrong"] * seen.forged),
        ),
        Bar(
            "the ledger reads 0 whenever its sources are up, and at the end",
            [f"above 0: {seen.gauge['above 0']} readings"] * bool(seen.gauge["above 0"])
            + [f"at the end: {seen.gauge_last}"] * (seen.gauge_last != 0)
            + [f"no reading of 0: {dict(seen.gauge)}"] * (not seen.gauge["0"]),
        ),
    ]


def _miscounted(seen: Evidence) -> list[str]:
    accepted, over = seen.ledger.get("accepted"), sum(seen.ledger.get("over", {}).values())
    return [f"accepted {accepted}, over {over}"] * ((accepted, over) != (seen.jobs, seen.jobs))


def lines(bars: list[Bar]) -> str:
    """Return the bars as text, with the first few wrong examples."""
    found = []
    for bar in bars:
        found.append(f"{'PASS' if bar.met else 'MISS'}  {bar.text}")
        found += [f"        {example}" for example in bar.wrong[:SHOWN]]
        if len(bar.wrong) > SHOWN:
            found.append(f"        and {len(bar.wrong) - SHOWN:,} more")
    return "\n".join(found)
