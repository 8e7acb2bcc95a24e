"""Translate a request of Ollama into a request of OpenAI's API."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from services.gateway.domain.llm import members
from services.gateway.domain.llm.members import Members
from services.gateway.domain.llm.ollama_messages import translated, user_content
from tidegate.kernel.errors import BadRequest

CHAT, COMPLETION, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
LATEST = ":latest"

# Ollama's options, and the names of each option in the engines' APIs. An engine ignores names that only
# another engine uses.
_OPTIONS: dict[str, tuple[str, ...]] = {
    "temperature": ("temperature",),
    "top_p": ("top_p",),
    "top_k": ("top_k",),
    "min_p": ("min_p",),
    "seed": ("seed",),
    "presence_penalty": ("presence_penalty",),
    "frequency_penalty": ("frequency_penalty",),
    "repeat_penalty": ("repetition_penalty", "repeat_penalty"),
    "repeat_last_n": ("repeat_last_n",),
    "typical_p": ("typical_p",),
    "mirostat": ("mirostat",),
    "mirostat_tau": ("mirostat_tau",),
    "mirostat_eta": ("mirostat_eta",),
}
_OF_DEPLOYMENT = "the Deployment sets this"
# Ollama's options and members that have no effect here, with the reason.
_IGNORED = {
    "num_ctx": "the Deployment's llm.context sets this",
    "num_batch": _OF_DEPLOYMENT,
    "num_gpu": _OF_DEPLOYMENT,
    "main_gpu": _OF_DEPLOYMENT,
    "num_thread": _OF_DEPLOYMENT,
    "num_keep": "the engine refuses a prompt that is too long",
    "keep_alive": "the Deployment's scale_to_zero_after_s sets this",
}
_UNKNOWN = "Tidegate does not have this option"


@dataclass(frozen=True, slots=True)
class OllamaCall:
    """A request of Ollama, translated for the engine.

    ``path``, ``body``: the URL path and the JSON body for the engine; the path is empty if no engine is
    needed. ``kind``: the API of Ollama that was called; it determines the form of the answer. ``model``: the
    model's name as the caller sent it. ``ignored``: members and options without effect, with the reason.
    ``unload``: True if the caller wants to unload the model.
    """

    kind: Literal["chat", "generate"]
    model: str
    stream: bool
    path: str
    body: dict[str, Any]
    ignored: dict[str, str] = field(default_factory=dict)
    images: bool = False
    unload: bool = False


def endpoint(model: str) -> str:
    """Return the endpoint's name for a model's name: remove the tag ``latest``."""
    return model.removesuffix(LATEST)


def chat(request: Members) -> OllamaCall:
    """Translate a request of ``/api/chat``; raise BadRequest if it is invalid."""
    messages = members.groups(request, "messages")
    if not messages:
        return _nothing("chat", request)
    body: dict[str, Any] = {"messages": translated(messages)}
    if tools := members.groups(request, "tools"):
        body["tools"] = tools
    return _call("chat", CHAT, request, body, any(message.get("images") for message in messages))


def generate(request: Members) -> OllamaCall:
    """Translate a request of ``/api/generate``; raise BadRequest if it is invalid.

    The model's template is applied to the prompt, as in a chat of one message. With ``raw`` or ``suffix``,
    the prompt goes to the engine unchanged.
    """
    if members.text(request, "template", ""):
        raise BadRequest("'template' is not supported: the engine applies the model's own template")
    if request.get("context"):
        raise BadRequest("'context' is not supported: send the earlier messages to /api/chat")
    prompt, images = members.text(request, "prompt", ""), members.texts(request, "images")
    if not prompt and not images:
        return _nothing("generate", request)
    suffix = members.text(request, "suffix", "")
    if members.flag(request, "raw") or suffix:
        if images:
            raise BadRequest("'images' cannot be sent with 'raw' or 'suffix'")
        body: dict[str, Any] = {"prompt": prompt} | ({"suffix": suffix} if suffix else {})
        return _call("generate", COMPLETION, request, body, images=False)
    system = members.text(request, "system", "")
    messages = [{"role": "system", "content": system}] if system else []
    body = {"messages": [*messages, {"role": "user", "content": user_content(prompt, images)}]}
    return _call("generate", CHAT, request, body, bool(images))


def embed(request: Members) -> tuple[dict[str, Any], dict[str, str]]:
    """Translate a request of ``/api/embed``; raise BadRequest if it is invalid.

    Return two dictionaries. The first is the body of the request to :data:`EMBEDDINGS`. The second contains
    the members that have no effect, each with the reason.
    """
    if request.get("truncate") is False:
        ignored = {}  # engines refuse an input that is too long, as the caller wants
    else:
        ignored = (
            {"truncate": "the engine refuses an input that is too long"} if "truncate" in request else {}
        )
    body: dict[str, Any] = {"input": members.texts(request, "input")}
    if (dimensions := members.whole(request, "dimensions", 1)) is not None:
        body["dimensions"] = dimensions
    if not body["input"]:
        raise BadRequest("the request has no 'input'; it must be a string or a list of strings")
    return body, ignored | _ignored(request)


def embed_one(request: Members) -> tuple[dict[str, Any], dict[str, str]]:
    """Translate a request of the older ``/api/embeddings``.

    Return two dictionaries, as :func:`embed` does.
    """
    return {"input": [members.text(request, "prompt")]}, _ignored(request)


def model_of(request: Members) -> str:
    """Return the name of a request's model. Older clients send it in the member ``name``."""
    name = members.text(request, "model", "") or members.text(request, "name", "")
    if not name:
        raise BadRequest("the request has no 'model'; GET /api/tags lists the models")
    return name


def _call(
    kind: Literal["chat", "generate"], path: str, request: Members, body: dict[str, Any], images: bool
) -> OllamaCall:
    options = members.group(request, "options")
    body |= {"stream": True} | _sampling(options) | _thinking(request)
    logprobs = members.flag(request, "logprobs")
    top = members.whole(request, "top_logprobs", 0) or 0
    if logprobs and path == CHAT:
        body |= {"logprobs": True, "top_logprobs": top}
    elif logprobs:
        body["logprobs"] = max(top, 1)
    body |= _format(request.get("format"), completion=path == COMPLETION)
    return OllamaCall(
        kind,
        model_of(request),
        members.flag(request, "stream", default=True),
        path,
        body,
        _ignored(request) | _ignored_options(options),
        images,
    )


def _nothing(kind: Literal["chat", "generate"], request: Members) -> OllamaCall:
    """Return the call for a request without a prompt.

    Clients send such a request to load or unload a model.
    """
    return OllamaCall(
        kind,
        model_of(request),
        members.flag(request, "stream", default=True),
        "",
        {},
        _ignored(request),
        unload=request.get("keep_alive") in (0, "0", "0s", "0m"),
    )


def _sampling(options: Members) -> dict[str, Any]:
    body = {
        name: options[option]
        for option, names in _OPTIONS.items()
        if options.get(option) is not None
        for name in names
    }
    if (most := members.whole(options, "num_predict")) is not None and most > 0:
        body["max_tokens"] = most
    if stop := members.texts(options, "stop"):
        body["stop"] = stop
    return body


def _thinking(request: Members) -> dict[str, Any]:
    think = request.get("think")
    if think is None:
        return {}
    if isinstance(think, str):
        return {"reasoning_effort": think}
    return {"chat_template_kwargs": {"enable_thinking": members.flag(request, "think")}}


def _format(wanted: Any, *, completion: bool) -> dict[str, Any]:
    if not wanted:
        return {}
    if wanted == "json":
        schema: dict[str, Any] = {"type": "object"}
        body: dict[str, Any] = {"response_format": {"type": "json_object"}}
    elif isinstance(wanted, dict):
        schema = wanted
        body = {
            "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": wanted}}
        }
    else:
        raise BadRequest("'format' must be \"json\" or a JSON schema")
    # For completions, llama.cpp needs the member json_schema instead of response_format.
    return body | ({"json_schema": schema} if completion else {})


def _ignored(request: Members) -> dict[str, str]:
    return {"keep_alive": _IGNORED["keep_alive"]} if request.get("keep_alive") is not None else {}


def _ignored_options(options: Members) -> dict[str, str]:
    return {
        name: _IGNORED.get(name, _UNKNOWN)
        for name, value in options.items()
        if value is not None and name not in _OPTIONS and name not in ("num_predict", "stop")
    }
