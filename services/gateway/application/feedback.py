"""Make the feedback ids of answers, and accept feedback.

Only the answers of endpoints that collect feedback get ids. These endpoints have a rollout, an experiment, or
the setting ``feedback``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prometheus_client import Counter

from services.gateway.domain.feedback_ids import AnswerFacts, FeedbackIds
from services.gateway.domain.feedback_items import FeedbackItem, read_item
from services.gateway.domain.paces import Paces
from services.gateway.domain.routing import DeploymentRoute, EndpointRoute, RouteTable
from services.gateway.domain.traffic_split import Origin
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.access import INFER, OPERATE, Principal
from tidegate.kernel.protocol.feedback import FeedbackRecord
from tidegate.kernel.protocol.jobs import Job, read_id
from tidegate.kernel.protocol.request_ids import LONGEST_ID
from tidegate.kernel.store import JobStore
from tidegate.kernel.store.feedback import MOST_NAMES, Added, FeedbackStore

RECEIVED = Counter("tidegate_gateway_feedback_total", "Feedback from callers, by outcome.", ["outcome"])

HEADER = b"x-feedback-id"
# A job's record contains the feedback id in the field with this name.
ASK = "feedback"
_AT_A_TIME = 100
# The most items of feedback per second from one caller, in one gateway process.
ITEMS_PER_S = 2000

Status = Literal["accepted", "duplicate", "invalid", "unknown", "expired", "forbidden"]


class PendingId:
    """A feedback id that is not complete yet: the Deployment of the answer is still missing."""

    __slots__ = ("_facts", "_ids")

    def __init__(self, ids: FeedbackIds, facts: tuple[str, str, bool, str, str, str]) -> None:
        self._ids = ids
        self._facts = facts

    def id(self, route: DeploymentRoute, *, moved: bool = False) -> bytes:
        """Return the feedback id of an answer of ``route``.

        ``moved``: True if another Deployment was chosen first. Such an answer does not belong to an
        experiment.
        """
        endpoint, request_id, assigned, unit, owner, experiment = self._facts
        return self._ids.make(
            AnswerFacts(
                endpoint,
                route.name,
                route.version,
                request_id,
                int(time.time() * 1e6),
                assigned and not moved,
                unit,
                owner,
                "" if moved else experiment,
            )
        )


class FeedbackTags:
    """Makes the feedback ids of answers. ``endpoints``: the endpoints that collect feedback, usually none."""

    def __init__(self, ids: FeedbackIds) -> None:
        self._ids = ids
        self._routes: dict[str, EndpointRoute] = {}
        self.endpoints: frozenset[str] = frozenset()

    def take(self, table: RouteTable) -> None:
        """Use a new route table."""
        self._routes = {name: route for name, route in table.endpoints.items() if route.feedback}
        self.endpoints = frozenset(self._routes)

    def begin(
        self, endpoint: str, version: str, origin: Callable[[], Origin], rid: bytes, principal: Principal
    ) -> PendingId | None:
        """Return a feedback id in which the Deployment is still missing.

        Return None if the endpoint collects no feedback.
        """
        route = self._routes.get(endpoint)
        if route is None:
            return None
        assigned, unit = not version, ""
        if assigned and (route.rules or route.sticky is not None):
            facts = origin()
            assigned = not route.has_rule_for(facts)
            key = route.sticky.key(facts) if route.sticky is not None else None
            unit = self._ids.unit(key) if key is not None else ""
        request_id = rid.decode("latin-1")[:LONGEST_ID]
        owner = self._ids.owner(principal.id)
        experiment = route.experiment if assigned else ""
        return PendingId(self._ids, (endpoint, request_id, assigned, unit, owner, experiment))


@dataclass(frozen=True, slots=True)
class ItemAnswer:
    """The status of one item of feedback, and the reason if the item was refused."""

    status: Status
    message: str = ""


class FeedbackIntake:
    """Accepts feedback for up to ``window_s`` seconds after the answer."""

    def __init__(self, ids: FeedbackIds, store: FeedbackStore, jobs: JobStore, window_s: float) -> None:
        self._ids = ids
        self._store = store
        self._jobs = jobs
        self._window_ms = int(window_s * 1e3)
        self._paces = Paces(ITEMS_PER_S, "items of feedback")

    async def accept(self, raw: Sequence[Any], principal: Principal) -> list[ItemAnswer]:
        """Accept items of feedback. Return the status of each item.

        When this method returns, the accepted items are on disk. Raise TooMany if the caller sends more than
        ``ITEMS_PER_S`` items per second. Raise StoreUnavailable if the store is down.
        """
        self._paces.check(principal.id, len(raw), time.monotonic())
        answers: list[ItemAnswer] = []
        for at in range(0, len(raw), _AT_A_TIME):
            answers += await self._accept(raw[at : at + _AT_A_TIME], principal)
            await asyncio.sleep(0)  # let the event loop serve other requests
        for each in answers:
            RECEIVED.labels(each.status).inc()
        return answers

    async def _accept(self, raw: Sequence[Any], principal: Principal) -> list[ItemAnswer]:
        now = int(time.time() * 1e3)
        answers: list[ItemAnswer | None] = []
        records: list[tuple[int, str, FeedbackRecord]] = []
        for at, each in enumerate(raw):
            try:
                item = read_item(each, now)
            except BadRequest as error:
                answers.append(ItemAnswer("invalid", error.message))
                continue
            found = await self._facts(item, principal)
            if isinstance(found, AnswerFacts):
                found = self._refusal(found, principal, now) or found
            if isinstance(found, ItemAnswer):
                answers.append(found)
                continue
            answers.append(None)
            records += [(at, _key(found), record) for record in _records(item, found)]
        added = await self._store.add([(key, record) for _, key, record in records], self._window_ms)
        results: dict[int, set[Added]] = {}
        for (at, _, _), result in zip(records, added, strict=True):
            results.setdefault(at, set()).add(result)
        return [each or _answer(results[at]) for at, each in enumerate(answers)]

    async def _facts(self, item: FeedbackItem, principal: Principal) -> AnswerFacts | ItemAnswer:
        if item.request_id and (facts := self._ids.read(item.request_id)) is not None:
            return facts
        job: Job | None = None
        if item.idempotency_key:
            job = await self._jobs.of_key(principal.id, item.idempotency_key)
        elif (id_ := read_id(item.request_id)) is not None:
            job = await self._jobs.get(id_)
        if job is None:
            return ItemAnswer("unknown", _UNKNOWN_KEY if item.idempotency_key else _UNKNOWN_ID)
        facts = self._ids.read(str(job.ask.get(ASK, "")))
        return facts or ItemAnswer("unknown", _NOT_COLLECTED)

    def _refusal(self, facts: AnswerFacts, principal: Principal, now: int) -> ItemAnswer | None:
        if facts.owner != self._ids.owner(principal.id) and not principal.may(OPERATE):
            return ItemAnswer("forbidden", _FOREIGN)
        if not principal.may(INFER, facts.endpoint) and not principal.may(OPERATE):
            return ItemAnswer("forbidden", f"this key may not use the model {facts.endpoint!r}")
        if now - facts.at // 1000 > self._window_ms:
            return ItemAnswer(
                "expired",
                f"the answer is older than {self._window_ms / 86_400_000:g} days, the limit for feedback "
                "(TIDEGATE_FEEDBACK_WINDOW_S)",
            )
        return None


_UNKNOWN_ID = (
    "this stack has no answer with this id: send the header X-Feedback-Id of the answer, or the id of a job"
)
_UNKNOWN_KEY = (
    "none of your jobs has this idempotency key, or the job was deleted: send X-Feedback-Id instead"
)
_NOT_COLLECTED = (
    "the endpoint collected no feedback when this job was submitted: start an experiment, or switch "
    "feedback on with `tidegate traffic NAME --feedback`"
)
_FOREIGN = "this answer belongs to another key: use that key, or a key with the scope operate"


def _key(facts: AnswerFacts) -> str:
    return f"{facts.endpoint}\0{facts.deployment}\0{facts.request_id}\0{facts.at}\0{facts.owner}"


def _records(item: FeedbackItem, facts: AnswerFacts) -> list[FeedbackRecord]:
    return [
        FeedbackRecord(
            facts.endpoint,
            facts.deployment,
            facts.version,
            facts.request_id,
            outcome.metric,
            outcome.value,
            outcome.label,
            item.at,
            facts.at // 1000,
            facts.assigned,
            facts.unit,
            facts.experiment,
        )
        for outcome in item.outcomes
    ]


def _answer(results: set[Added]) -> ItemAnswer:
    if "added" in results:
        return ItemAnswer("accepted")
    if "too_many" in results:
        return ItemAnswer(
            "invalid",
            f"this answer already has {MOST_NAMES} metrics other than score, reward and label, which is the "
            "limit: use fewer metrics",
        )
    return ItemAnswer(
        "duplicate", "this answer already has a value for this metric, and only the first value counts"
    )
