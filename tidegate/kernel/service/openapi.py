"""Build the OpenAPI document of a service: FastAPI's document, plus errors and credentials of all routes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from tidegate.kernel.protocol.permissions import ANY, INTERNAL, OPEN, RoutePermissions, Scopes

_COMPONENT = "#/components/schemas/"
_WRITES = {"post", "put", "patch", "delete"}
_METHODS = _WRITES | {"get", "head"}
_SCHEMAS: dict[str, Any] = {
    "Error": {
        "type": "object",
        "description": "The content of every error answer; programs should check `reason`.",
        "required": ["error", "reason", "request_id"],
        "properties": {name: {"type": "string"} for name in ("error", "reason", "request_id")},
    }
}
_TEXTS = {
    "400": "The request is wrong: its shape, a name, or a value.",
    "401": "No credential, or one that is unknown, expired or revoked.",
    "403": "The credential lacks a scope for this route, or the request comes from a page of another site.",
    "404": "The named thing does not exist.",
    "409": "The named thing exists already, is in use, or has changed.",
    "412": "The object does not meet the condition in the header If-Match or If-None-Match.",
    "413": "The body is larger than the limit.",
    "429": "The caller has used up its rate, its concurrent requests or its quota.",
    "500": "The model failed.",
    "503": "A required part of Tidegate does not answer now.",
    "504": "The deadline passed before there was an answer.",
}


@dataclass(frozen=True, slots=True)
class ErrorForm:
    """The form of errors, for routes that follow another API than Tidegate's.

    ``name`` and ``schema`` describe the error's body. ``statuses``: more status codes, each with its meaning.
    """

    name: str
    schema: Mapping[str, Any]
    statuses: Mapping[str, str] = field(default_factory=dict)


def document(
    app: FastAPI,
    permissions: RoutePermissions,
    front: Mapping[str, Any],
    error_forms: Mapping[str, ErrorForm],
) -> dict[str, Any]:
    """Return the whole document.

    ``error_forms``: the form of errors for each tag of a route.
    ``front``: the paths of routes that another layer answers before a request reaches the app. Only the
      gateway has such routes. The gateway calls models, so all its routes also list the errors of models.
    """
    made = get_openapi(title=app.title, version=app.version, routes=app.routes)
    models = bool(front)
    for path, item in front.items():
        made["paths"].setdefault(path, {}).update(copy.deepcopy(item))
    for path, item in made["paths"].items():
        for method, operation in item.items():
            if method in _METHODS:
                route = permissions.find(method.upper(), path.replace("{rest}", "{rest:path}"))
                form = next(
                    (error_forms[tag] for tag in operation.get("tags", ()) if tag in error_forms), None
                )
                _complete(operation, method, path, route.scopes if route else (), models, form)
    components = made.setdefault("components", {})
    kept = components.get("schemas", {})
    components["schemas"] = {k: v for k, v in kept.items() if k not in _FRAMEWORK} | _SCHEMAS
    components["schemas"] |= {form.name: dict(form.schema) for form in error_forms.values()}
    components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    return made


# FastAPI's schemas for its answer 422. Tidegate's services answer 400 instead, in their own form.
_FRAMEWORK = {"HTTPValidationError", "ValidationError"}


def _complete(
    operation: dict[str, Any],
    method: str,
    path: str,
    scopes: Scopes,
    models: bool,
    form: ErrorForm | None,
) -> None:
    responses = operation["responses"]
    responses.pop("422", None)
    reference = {"$ref": _COMPONENT + (form.name if form else "Error")}
    texts = {status: _TEXTS[status] for status in _statuses(method, path, scopes, models)}
    if any(parameter["name"] == "If-Match" for parameter in operation.get("parameters", ())):
        texts["412"] = _TEXTS["412"]
    for status, text in (texts | dict(form.statuses if form else {})).items():
        shown = {"description": text, "content": {"application/json": {"schema": reference}}}
        if method == "head":
            del shown["content"]
        responses.setdefault(status, shown)
    if scopes != (OPEN,):
        operation["security"] = [{"bearer": []}]
        operation["x-tidegate-scopes"] = [scope for scope in scopes if scope not in (ANY, INTERNAL)]


def _statuses(method: str, path: str, scopes: Scopes, models: bool) -> list[str]:
    # Every route can answer 400 to an unreadable request, and 403 to a request from a page of another site.
    # It can answer 503 while a required part of Tidegate does not answer.
    found = ["400", "403", "503"]
    if scopes != (OPEN,):
        found.append("401")
    if "{" in path:
        found.append("404")
    if method in _WRITES:
        found += ["404", "409", "413"]
    if models and scopes != (OPEN,):
        found += ["404", "429", "504"]
        if method in _WRITES:
            found.append("500")
    return found


def inlined(model: type[BaseModel]) -> dict[str, Any]:
    """Return the JSON schema of a Pydantic model, with its definitions inlined.

    So any document can contain the schema.
    """
    whole = model.model_json_schema()
    definitions = whole.pop("$defs", {})

    def written_out(part: Any) -> Any:
        if isinstance(part, dict):
            if "$ref" in part:
                return written_out(definitions[part["$ref"].rpartition("/")[2]])
            return {key: written_out(value) for key, value in part.items()}
        return [written_out(value) for value in part] if isinstance(part, list) else part

    schema: dict[str, Any] = written_out(whole)
    return schema
