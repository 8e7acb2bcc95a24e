"""The errors of other systems' APIs, in the form that their clients read."""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import Any

import orjson
from starlette.responses import Response

from tidegate.kernel import errors
from tidegate.kernel.errors import TidegateError
from tidegate.kernel.protocol.redaction import for_caller
from tidegate.kernel.service.error_answers import error_response, status_of
from tidegate.kernel.service.openapi import ErrorForm

_STRINGS = {"type": "string"}
_EITHER = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"oneOf": [_STRINGS, {"type": "object", "required": ["message"]}]}},
}


def _object(*names: str) -> dict[str, Any]:
    return {"type": "object", "required": list(names), "properties": dict.fromkeys(names, _STRINGS)}


ROWS_ERROR_FORMS = MappingProxyType({
    # TensorFlow Serving and OpenAI's API share the path ``/v1/models/NAME``. At this path, the member
    # ``error`` is a string (TensorFlow Serving) or an object (OpenAI).
    "TensorFlow Serving": ErrorForm("TensorFlowServingError", _EITHER),
    "TorchServe": ErrorForm(
        "TorchServeError",
        {**_object("type", "message"), "properties": {"code": {"type": "integer"}, "type": _STRINGS,
                                                      "message": _STRINGS}},
    ),
    "SageMaker": ErrorForm(
        "SageMakerError", _object("__type", "message", "Message"), {"424": "The model failed."}
    ),
    "Azure ML": ErrorForm(
        "AzureMlError",
        {"type": "object", "required": ["error"], "properties": {"error": _object("code", "message")}},
    ),
})  # fmt: skip


def tf_serving(error: TidegateError) -> Response:
    """Return an error as TensorFlow Serving and KServe v1 do."""
    return _answer(error, {"error": for_caller(error)})


def torch_serve(error: TidegateError) -> Response:
    """Return an error as TorchServe does."""
    kinds: dict[type[TidegateError], str] = {
        errors.NotFound: "ModelNotFoundException",
        errors.BadRequest: "BadRequestException",
        errors.MethodNotAllowed: "MethodNotAllowedException",
        errors.PayloadTooLarge: "RequestEntityTooLargeException",
    }
    kind = next((kinds[each] for each in type(error).__mro__ if each in kinds), "InternalServerException")
    if status_of(error) == 503:
        kind = "ServiceUnavailableException"
    return _answer(error, {"code": status_of(error), "type": kind, "message": for_caller(error)})


def sage_maker(error: TidegateError) -> Response:
    """Return an error as SageMaker's runtime does. The SDK reads the error's class from a header."""
    status = status_of(error)
    if isinstance(error, errors.ModelFailed):
        status, kind = 424, "ModelError"
    elif isinstance(error, errors.TooMany):
        kind = "ThrottlingException"
    elif isinstance(error, errors.Unauthorized | errors.Forbidden):
        kind = "AccessDeniedException"
    elif status == 503:
        kind = "ServiceUnavailable"
    elif status >= 500:
        kind = "InternalFailure"
    else:
        kind = "ValidationError"
    text = for_caller(error)
    found = _answer(error, {"__type": kind, "message": text, "Message": text, "OriginalMessage": text})
    found.status_code = status
    found.headers["x-amzn-errortype"] = kind
    return found


def azure_ml(error: TidegateError) -> Response:
    """Return an error in the form of Azure's APIs."""
    return _answer(error, {"error": {"code": error.reason, "message": for_caller(error)}})


_FORMS = (
    (re.compile(r"/v1/models/[^/]+(/(versions|labels)/[^/]+)?:(predict|classify|regress)"), tf_serving),
    (re.compile(r"/v1/models/[^/]+/((versions|labels)/[^/]+|.*metadata)"), tf_serving),
    (re.compile(r"/predictions/.*|/models(/[^/]+){0,2}"), torch_serve),
    (re.compile(r"/invocations|/endpoints/[^/]+/(async-)?invocations|/models/[^/]+/invoke"), sage_maker),
    (re.compile(r"/endpoints/[^/]+/score"), azure_ml),
)


def rows_error_at(path: str, error: TidegateError) -> Response | None:
    """Return the response for an error that occurs before routing, in the format of the path's API.

    Return None if the path belongs to no API of this module.
    """
    form = next((form for pattern, form in reversed(_FORMS) if pattern.fullmatch(path)), None)
    return None if form is None else form(error)


def _answer(error: TidegateError, document: dict[str, Any]) -> Response:
    answer = error_response(error, "")
    answer.body = orjson.dumps(document)
    answer.headers["content-length"] = str(len(answer.body))
    return answer
