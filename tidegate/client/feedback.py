"""Report outcomes of answers. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import Any

import orjson

from tidegate.client.core import Core
from tidegate.client.errors import BadAnswer
from tidegate.client.flow import Answer, Flow
from tidegate.client.jobs import Handle

Document = dict[str, Any]
PATH = "/v1/feedback"
# The highest number of items in one call.
MOST = 1000


@dataclass(frozen=True, slots=True)
class FeedbackFlows:
    """The flows of feedback. A repeated call is safe, because each outcome counts once."""

    core: Core

    def one(self, item: Mapping[str, Any], timeout_s: float | None) -> Flow[Document]:
        """Report the outcome of one answer. Raise NotFound, Forbidden or BadRequest if it is refused."""
        return _document((yield from self._post(orjson.dumps(dict(item)), timeout_s)))

    def many(self, items: Iterable[Mapping[str, Any]], timeout_s: float | None) -> Flow[list[Document]]:
        """Report the outcomes of many answers. Return the status of each item."""
        left, found, done = iter(items), list[Document](), 0
        while part := [dict(item) for item in islice(left, MOST)]:
            answer = _document((yield from self._post(orjson.dumps(part), timeout_s)))
            found += [{**each, "index": done + each["index"]} for each in answer["items"]]
            done += len(part)
        return found

    def _post(self, body: bytes, timeout_s: float | None) -> Flow[Answer]:
        limit = self.core.timeout_s if timeout_s is None else timeout_s
        headers = {"Content-Type": "application/json"}
        return (
            yield from self.core.caller.call("POST", PATH, timeout_s=limit, headers=headers, content=body)
        )


def item_of(
    answer: Any,
    idempotency_key: str | None,
    outcomes: Mapping[str, Any],
    at: datetime | float | None,
) -> Document:
    """Return the JSON object that reports an outcome.

    ``answer``: a result, a job, or an id; raise TypeError for anything else. ``at``: the time of the outcome.
    """
    item = {name: value for name, value in outcomes.items() if value is not None}
    if idempotency_key is not None:
        item["idempotency_key"] = idempotency_key
    if answer is not None:
        item["request_id"] = _id_of(answer)
    if at is not None:
        item["at"] = at.astimezone().isoformat() if isinstance(at, datetime) else at
    return item


def _id_of(answer: Any) -> str:
    if isinstance(answer, str):
        return answer
    if isinstance(answer, Handle):
        return answer.id
    found = getattr(answer, "feedback_id", None)
    if not isinstance(found, str):
        raise TypeError(f"feedback needs a result, a job or an id, got {type(answer).__name__}")
    if not found:
        raise TypeError(
            "this answer has no feedback_id, because its endpoint collects no feedback: start an experiment, "
            "or run `tidegate traffic NAME --feedback`"
        )
    return found


def _document(answer: Answer) -> Document:
    try:
        found = orjson.loads(answer.body)
    except orjson.JSONDecodeError:
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("items"), list):
        raise BadAnswer("The answer to feedback is malformed; is this the URL of a Tidegate gateway?")
    return found
