"""The JSON forms of errors in the APIs of other systems, for the OpenAPI document.

A request at a path of TGI, Ollama or vLLM can be refused before its route is known. Then the error has
Tidegate's form. Clients of these APIs can read it, because its member ``error`` is a string, as they expect.
"""

from __future__ import annotations

from types import MappingProxyType

from tidegate.kernel.service.openapi import ErrorForm

_TEXT = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
_OBJECT = {
    "type": "object",
    "required": ["message", "type", "param", "code"],
    "properties": {
        "message": {"type": "string"},
        "type": {"type": "string"},
        "param": {"type": ["string", "null"]},
        "code": {"type": ["string", "null"]},
    },
}
_EITHER = {"oneOf": [{"type": "string"}, _OBJECT]}
_ENGINE = {
    "422": "The engine refuses the request.",
    "501": "The engine cannot do this with its model.",
    "502": "The engine or the upstream failed.",
}

ERROR_FORMS = MappingProxyType({
    "OpenAI": ErrorForm(
        "OpenAiError", {"type": "object", "required": ["error"], "properties": {"error": _OBJECT}}, _ENGINE
    ),
    # Some paths below /tgi/{model} belong to OpenAI's API, so their errors have OpenAI's form.
    "TGI": ErrorForm(
        "TgiError",
        {"type": "object", "required": ["error"], "properties": {"error": _EITHER}},
        _ENGINE | {"404": "There is no such model.", "422": "The request is wrong."},
    ),
    "Ollama": ErrorForm("OllamaError", _TEXT, _ENGINE),
    "Engines": ErrorForm(
        "EngineError",
        {"type": "object", "required": ["error"], "properties": {"error": _EITHER}},
        _ENGINE,
    ),
})  # fmt: skip
