"""The OpenAPI description of the routes that ``hot_path.py`` and ``asgi_fallback.py`` serve."""

from __future__ import annotations

from typing import Any

_PARAMETERS = {"type": "object"}
_TENSOR = {
    "type": "object",
    "required": ["name", "datatype", "shape"],
    "properties": {
        "name": {"type": "string"},
        "datatype": {"type": "string"},
        "shape": {"type": "array", "items": {"type": "integer"}},
        "parameters": _PARAMETERS,
        "data": {"type": "array", "items": {}},
    },
}
_INPUTS = {
    "id": {"type": "string"},
    "parameters": _PARAMETERS,
    "inputs": {"type": "array", "minItems": 1, "items": _TENSOR},
    "outputs": {
        "type": "array",
        "items": {
            "type": "object",
            "required": ["name"],
            "properties": {"name": {"type": "string"}, "parameters": _PARAMETERS},
        },
    },
}
_REQUEST = {"type": "object", "required": ["inputs"], "properties": _INPUTS}
_JOB = {
    "type": "object",
    "required": ["model", "inputs"],
    "properties": _INPUTS
    | {
        "model": {"type": "string"},
        "version": {"type": ["string", "integer", "null"]},
        "priority": {"enum": ["high", "normal", "low", None]},
        "ttl_s": {"type": ["number", "null"], "minimum": 1, "maximum": 30 * 86_400},
        "webhook": {"type": ["string", "null"]},
        "metadata": {"type": ["object", "null"]},
    },
}
_ANSWER = {
    "type": "object",
    "required": ["model_name", "outputs"],
    "properties": {
        "model_name": {"type": "string"},
        "model_version": {"type": "string"},
        "id": {"type": "string"},
        "parameters": _PARAMETERS,
        "outputs": {"type": "array", "items": _TENSOR},
    },
}
_ACCEPTED = {"description": "A job.", "content": {"application/json": {"schema": {"type": "object"}}}}


def _body(schema: dict[str, Any]) -> dict[str, Any]:
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def _infer(operation: str, *names: str) -> dict[str, Any]:
    return {
        "tags": ["Open Inference Protocol v2"],
        "summary": "Infer",
        "operationId": operation,
        "description": (
            "Send an inference request. With `Prefer: respond-async` or `Prefer: wait=N` it becomes a job. "
            "Binary tensors need the header `Inference-Header-Content-Length`, as in Triton."
        ),
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ],
        "requestBody": _body(_REQUEST),
        "responses": {
            "200": {
                "description": "The answer.",
                "content": {
                    "application/json": {"schema": _ANSWER},
                    "application/octet-stream": {},
                },
            },
            "202": _ACCEPTED,
        },
    }


PATHS: dict[str, dict[str, Any]] = {
    "/v2/models/{model}/infer": {"post": _infer("infer", "model")},
    "/v2/models/{model}/versions/{version}/infer": {"post": _infer("infer_version", "model", "version")},
    "/v1/jobs": {
        "post": {
            "tags": ["Jobs"],
            "summary": "Submit",
            "operationId": "submit_job",
            "description": "Submit a job: an inference request with the model's name and the job's options.",
            "requestBody": _body(_JOB),
            "responses": {
                "202": _ACCEPTED,
                "200": {"description": "The result, if it was ready within N seconds of `Prefer: wait=N`."},
            },
        }
    },
}
