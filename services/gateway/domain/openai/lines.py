"""The lines of OpenAI's batch files: check the requests, and format their results. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import orjson

from services.gateway.domain import llm_jobs
from tidegate.kernel.errors import BadRequest, TidegateError
from tidegate.kernel.protocol import bounded_json

MAX_CUSTOM_ID = 512
# The longest accepted name of a model, in characters. The name of an endpoint with its adapter is always
# shorter.
MAX_MODEL = 512
# A FileCheck remembers the result of ``check_model`` for at most this many models. If a file names more
# models, some of them are checked more than once.
MOST_MODELS = 1000
# Only this many bad lines are listed: the first ones of the file.
MAX_ERRORS = 100


class RequestLine(NamedTuple):
    """A request in a batch's file."""

    custom_id: str
    model: str
    body: dict[str, Any]


class BadLine(NamedTuple):
    """A bad line and its problem. ``line``: its number in the uploaded file, from 1."""

    code: str
    message: str
    param: str | None
    line: int

    def public(self) -> dict[str, Any]:
        """Return the error as OpenAI's API shows it."""
        return self._asdict()


class LineError(BadRequest):
    """The error for a line that is not a valid request of the batch.

    ``code`` and ``param`` are those of OpenAI's errors.
    """

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


def read_line(raw: bytes, endpoint: str) -> RequestLine:
    """Parse a line of a batch for ``endpoint``. Raise LineError if the line is not valid."""
    try:
        line = bounded_json.loads(raw, "the line")
    except TidegateError as error:
        raise LineError("invalid_json_line", error.message) from None
    if not isinstance(line, dict):
        raise LineError("invalid_json_line", "the line is not a JSON object")
    custom_id, body = line.get("custom_id"), line.get("body")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID:
        message = f"'custom_id' must be a string of 1..{MAX_CUSTOM_ID} characters"
        raise LineError("missing_required_parameter", message, "custom_id")
    if line.get("method") != "POST":
        raise LineError("invalid_method", "'method' must be POST", "method")
    if line.get("url") != endpoint:
        message = f"'url' must be the batch's endpoint {endpoint}, got {str(line.get('url'))[:60]!r}"
        raise LineError("invalid_url", message, "url")
    if not isinstance(body, dict):
        raise LineError("missing_required_parameter", "'body' must be the JSON of the request", "body")
    model = body.get("model")
    if not isinstance(model, str) or not 0 < len(model) <= MAX_MODEL:
        raise LineError("missing_required_parameter", "'body.model' must name a model", "body.model")
    if body.get("stream"):
        raise LineError(
            "invalid_request", "a line of a batch cannot stream: leave out 'stream'", "body.stream"
        )
    return RequestLine(custom_id, model, body)


class FileCheck:
    """Check a whole file, line by line.

    ``errors``: the first bad lines, at most :data:`MAX_ERRORS`. ``check_model`` raises a TidegateError if the
    caller cannot use a model.
    """

    def __init__(self, endpoint: str, check_model: Callable[[str], None]) -> None:
        self._endpoint = endpoint
        self._check_model = check_model
        self._seen: set[int] = set()
        self._models: dict[str, TidegateError | None] = {}
        self._model: str | None = None
        self._line = 0
        self.requests = 0
        self.errors: list[BadLine] = []

    @property
    def model(self) -> str:
        """Return the model that all lines name; empty if the lines name different models."""
        return self._model or ""

    def add(self, lines: Iterable[bytes]) -> None:
        """Check the next lines of the file. Blank lines are ignored."""
        for raw in lines:
            self._line += 1
            if not raw.strip():
                continue
            self.requests += 1
            try:
                self._check(raw)
            except LineError as error:
                if len(self.errors) < MAX_ERRORS:
                    self.errors.append(BadLine(error.code, error.message, error.param, self._line))

    def _check(self, raw: bytes) -> None:
        line = read_line(raw, self._endpoint)
        key = hash(line.custom_id)
        if key in self._seen:
            message = f"an earlier line has the custom_id {line.custom_id[:60]!r} too"
            raise LineError("duplicate_custom_id", message, "custom_id")
        self._seen.add(key)
        self._model = line.model if self._model in (None, line.model) else ""
        if line.model not in self._models:
            if len(self._models) >= MOST_MODELS:
                self._models.clear()
            try:
                self._check_model(line.model)
            except TidegateError as error:
                self._models[line.model] = error
            else:
                self._models[line.model] = None
        if (problem := self._models[line.model]) is not None:
            raise LineError("model_not_found", problem.message, "body.model")


def custom_id(raw: bytes) -> str | None:
    """Return the ``custom_id`` of a line; None if the line has no valid one."""
    try:
        value = bounded_json.loads(raw, "the line")
    except TidegateError:
        return None
    found = value.get("custom_id") if isinstance(value, dict) else None
    return found if isinstance(found, str) else None


def result_line(custom_id: str | None, job: str, answer: llm_jobs.LlmJobAnswer) -> bytes:
    """Return the result line of a request that the engine answered or refused."""
    body = answer.body
    if b"\n" in body or b"\r" in body:
        body = orjson.dumps(orjson.loads(body))
    head = orjson.dumps({"id": f"batch_req_{job}", "custom_id": custom_id})
    return b'%b,"response":{"status_code":%d,"request_id":"%b","body":%b},"error":null}' % (
        head[:-1],
        answer.status,
        job.encode(),
        body,
    )


_CODES = {"expired": "batch_expired", "cancelled": "batch_cancelled"}


def failed_line(id_: str, custom_id: str | None, error: TidegateError) -> bytes:
    """Return the result line of a request without an answer.

    ``id_``: the job's id, or a unique name if there is no job.
    """
    problem = {"code": _CODES.get(error.reason, error.reason), "message": error.message}
    return orjson.dumps(
        {"id": f"batch_req_{id_}", "custom_id": custom_id, "response": None, "error": problem}
    )
