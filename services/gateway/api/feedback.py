"""The HTTP API of feedback: one outcome as a JSON object, or many as a JSON list or as JSON Lines."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from services.gateway.api.job_http import json_response
from services.gateway.application.feedback import FeedbackIntake, ItemAnswer
from tidegate.kernel.errors import BadRequest, Forbidden, NotFound, PayloadTooLarge
from tidegate.kernel.protocol import bounded_json
from tidegate.kernel.protocol.access import INFER, OPERATE
from tidegate.kernel.service import caller

MOST = 1000
# The most bytes of a body. The limit is three times the size of a thousand usual items.
BODY_BYTES = 1024 * 1024
_LINES = ("application/x-ndjson", "application/jsonl", "application/x-jsonlines", "application/json-lines")


class FeedbackRoutes:
    """The route ``POST /v1/feedback``."""

    def __init__(self, intake: FeedbackIntake) -> None:
        self._intake = intake
        self.router = APIRouter(prefix="/v1", tags=["Feedback"])
        self.router.add_api_route(
            "/feedback", self.feedback, methods=["POST"], status_code=202, openapi_extra=_BODY
        )

    async def feedback(self, request: Request) -> Response:
        """Report outcomes of answers: a score, a label, a reward, or any metric with a value.

        ``request_id`` is the header ``X-Feedback-Id`` of an answer, or the id of a job. For a list or
        JSON Lines, ``items`` in the response has the status of each item. If the same metric of an answer is
        reported again, only the first value counts.
        """
        principal = caller.require(INFER, OPERATE)
        raw, single = _items(await request.body(), request.headers.get("content-type", ""))
        answers = await self._intake.accept(raw, principal)
        if single:
            _raise_for(answers[0])
        items = [_shown(at, each) for at, each in enumerate(answers)]
        counts = {name: sum(each.status == name for each in answers) for name in ("accepted", "duplicate")}
        refused = len(answers) - sum(counts.values())
        return json_response({**counts, "refused": refused, "items": items}, 202)


def _items(body: bytes, content_type: str) -> tuple[list[Any], bool]:
    """Return the items of a body, and True if the body is a single item.

    Raise BadRequest if there is no item, or if a body other than JSON Lines is not valid JSON. Raise
    PayloadTooLarge if there are too many items.
    """
    if content_type.partition(";")[0].strip().lower() in _LINES:
        lines = [line for line in body.splitlines() if line.strip()]
        _check_number(len(lines))
        return [_line(line) for line in lines], False
    document = bounded_json.loads(body)
    if isinstance(document, list):
        _check_number(len(document))
        return document, False
    return [document], True


def _line(line: bytes) -> Any:
    """Return the item in a line, or None if the line is not JSON.

    A None causes the refusal of this item only, not of the whole body.
    """
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        return None


def _check_number(number: int) -> None:
    if not number:
        raise BadRequest("the list of feedback is empty: send one item or more")
    if number > MOST:
        raise PayloadTooLarge(
            f"a call may have at most {MOST} items of feedback, got {number}: send them in several calls"
        )


def _shown(index: int, answer: ItemAnswer) -> dict[str, Any]:
    shown: dict[str, Any] = {"index": index, "status": answer.status}
    return shown | {"message": answer.message} if answer.message else shown


def _raise_for(answer: ItemAnswer) -> None:
    """Raise the error of a single item that was refused."""
    if answer.status == "invalid":
        raise BadRequest(answer.message)
    if answer.status == "forbidden":
        raise Forbidden(answer.message, reason="foreign_answer")
    if answer.status in ("unknown", "expired"):
        raise NotFound(answer.message, reason=f"{answer.status}_answer")


_ITEM = {
    "type": "object",
    "properties": {
        "request_id": {"type": "string", "description": "X-Feedback-Id of an answer, or the id of a job."},
        "idempotency_key": {
            "type": "string",
            "description": "The Idempotency-Key of a job. Send either this or request_id.",
        },
        "score": {"type": "number"},
        "reward": {"type": "number"},
        "label": {"type": "string"},
        "metric": {"type": "string", "description": "The name of any other metric. Send its `value` too."},
        "value": {"oneOf": [{"type": "number"}, {"type": "string"}]},
        "at": {"oneOf": [{"type": "string", "format": "date-time"}, {"type": "number"}]},
    },
    "example": {"request_id": "fb1.WyJkaWdpdHMi", "score": 0.9},
}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"oneOf": [_ITEM, {"type": "array", "items": _ITEM, "maxItems": MOST}]}
            },
            "application/x-ndjson": {"schema": {"type": "string"}},
        },
    }
}
