"""Convert errors to OpenAI's format: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import re
from typing import NamedTuple

import orjson
from starlette.responses import Response

from services.gateway.domain.llm.refusal import EngineRefused
from tidegate.kernel import errors
from tidegate.kernel.errors import TidegateError, whole_seconds
from tidegate.kernel.protocol.redaction import for_caller
from tidegate.kernel.service.error_answers import error_response, status_of

PATHS = re.compile(r"/v1/(chat/completions|completions|embeddings|responses|(models|files)(/.*)?)")

_INVALID, _SERVER = "invalid_request_error", "server_error"
_CONTEXT = re.compile(
    r"context (length|size|window)|maximum model length|exceed_context|too many tokens", re.I
)


class OpenAiError(NamedTuple):
    """An error in OpenAI's format."""

    status: int
    type: str
    code: str | None
    param: str | None
    message: str

    def body(self) -> bytes:
        """Return the JSON body."""
        return orjson.dumps(self.document())

    def document(self) -> dict[str, dict[str, str | None]]:
        """Return the body as a JSON object that is not encoded yet."""
        return {"error": self._members()}

    def event(self, *, named: bool) -> bytes:
        """Return the last event of a stream that failed. ``named``: True for the Responses API's format."""
        if not named:
            return b"data: %b\n\n" % self.body()
        members = self._members()
        document = members | {"type": "error", "error": members}
        return b"event: error\ndata: %b\n\n" % orjson.dumps(document)

    def _members(self) -> dict[str, str | None]:
        return {"message": self.message, "type": self.type, "param": self.param, "code": self.code}


# OpenAI's type and code for each class of error. If the code is None, the error's own reason is the code.
_WORDS: dict[type[TidegateError], tuple[str, str | None]] = {
    errors.BadRequest: (_INVALID, None),
    errors.Unauthorized: ("authentication_error", "invalid_api_key"),
    errors.Forbidden: ("permission_error", "insufficient_permissions"),
    errors.NotFound: (_INVALID, "model_not_found"),
    errors.MethodNotAllowed: (_INVALID, None),
    errors.Conflict: (_INVALID, None),
    errors.PayloadTooLarge: (_INVALID, "request_too_large"),
    errors.TooMany: ("rate_limit_error", "rate_limit_exceeded"),
    errors.DeadlinePassed: (_SERVER, "timeout"),
}
_BY_STATUS = {
    400: _INVALID,
    404: _INVALID,
    413: _INVALID,
    422: _INVALID,
    429: "rate_limit_error",
}


def openai_error(error: TidegateError) -> OpenAiError:
    """Convert an error to OpenAI's format."""
    if isinstance(error, EngineRefused):
        return _engines(error)
    kind, code = next((_WORDS[cls] for cls in type(error).__mro__ if cls in _WORDS), (_SERVER, None))
    if error.reason in ("quota_exhausted", "token_quota_exhausted"):
        kind = code = "insufficient_quota"
    if error.reason == "token_rate_limited":
        kind = "tokens"
    param = "model" if isinstance(error, errors.NotFound) else None
    if isinstance(error, errors.NotFound) and error.reason != errors.NotFound.reason:
        param, code = None, error.reason  # the error is not about a model
    return OpenAiError(status_of(error), kind, code or error.reason, param, for_caller(error))


def _engines(error: EngineRefused) -> OpenAiError:
    """Convert the error of an engine or a provider to OpenAI's format."""
    if error.status in (401, 403):
        return OpenAiError(
            502,
            _SERVER,
            "upstream_refused",
            None,
            f"the upstream refuses this stack's credential: {error.message}",
        )
    detail = error.detail
    code, param = detail.get("code"), detail.get("param")
    given = str(detail.get("type") or "")
    if error.status < 500 and (_CONTEXT.search(given) or _CONTEXT.search(error.message)):
        return OpenAiError(400, _INVALID, "context_length_exceeded", _text(param), error.message)
    kind = _BY_STATUS.get(error.status, _SERVER if error.status >= 500 else _INVALID)
    if error.status == 429:
        code = code if isinstance(code, str) else "rate_limit_exceeded"
        kind = given or kind
    return OpenAiError(error.status, kind, _text(code), _text(param), error.message)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def internal() -> OpenAiError:
    """Return the answer for an unexpected error."""
    return OpenAiError(500, _SERVER, "internal", None, "internal error; see the log of the service")


def headers_of(error: TidegateError) -> dict[str, str]:
    """Return the headers of an error's answer."""
    headers: dict[str, str] = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(whole_seconds(error.retry_after_s))
    if isinstance(error, errors.Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, errors.MethodNotAllowed) and error.allowed:
        headers["Allow"] = ", ".join(error.allowed)
    if isinstance(error, errors.TooMany):
        headers |= error.headers
    return headers


def openai_response(error: TidegateError) -> Response:
    """Return an error as an HTTP answer in OpenAI's format."""
    found = openai_error(error)
    return Response(found.body(), found.status, headers_of(error), "application/json")


def answer_at(path: str, error: TidegateError, rid: str) -> Response:
    """Return an error as an answer.

    If the path belongs to OpenAI's API, the error has OpenAI's format, else Tidegate's format.
    """
    return openai_response(error) if PATHS.fullmatch(path) else error_response(error, rid)
