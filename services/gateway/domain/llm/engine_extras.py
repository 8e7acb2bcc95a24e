"""Translate requests for tokenization and scores, which OpenAI's API does not have.

vLLM, llama.cpp and TGI use different bodies for ``/tokenize``. The body for an engine has the members of vLLM
and llama.cpp, so the gateway does not need to know which engine it works with. An answer to a caller has the
members of vLLM and llama.cpp, too. If the request has TGI's form, the answer is a list, as in TGI.
"""

from __future__ import annotations

from typing import Any

import orjson

from services.gateway.domain.llm import members
from services.gateway.domain.llm.members import Members
from tidegate.kernel.errors import BadRequest, NotFound

TOKENIZE, DETOKENIZE, TEMPLATE = "/tokenize", "/detokenize", "/apply-template"
# Requests to these paths, and their answers, pass unchanged.
PASSED = ("/pooling", "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank")


def of_tgi(request: Members) -> bool:
    """Return True if a request has TGI's form. The answer to this form must be a list."""
    return "inputs" in request


def tokenize(request: Members) -> dict[str, Any]:
    """Return the body for an engine's ``/tokenize``.

    Raise BadRequest if the request has nothing to tokenize, or if a member has the wrong type.
    """
    if messages := members.groups(request, "messages"):
        return {name: value for name, value in request.items() if name != "model"} | {"messages": messages}
    named = [name for name in ("prompt", "content", "inputs") if name in request]
    if not named:
        raise BadRequest("the request has nothing to tokenize: add 'prompt' or 'messages'")
    prompt = members.text(request, named[0])
    default = named[0] != "content"  # only llama.cpp uses 'content'; by default, it adds no special tokens
    special = members.flag(request, "add_special_tokens", members.flag(request, "add_special", default))
    strings = of_tgi(request) or members.flag(request, "return_token_strs")
    return {
        "prompt": prompt,
        "content": prompt,
        "add_special_tokens": special,
        "add_special": special,
        "return_token_strs": strings,
        "with_pieces": strings or members.flag(request, "with_pieces"),
    }


def lacks_template(answer: bytes) -> bool:
    """Return True if an engine ignored the messages, because its ``/tokenize`` accepts only text.

    The answer of such an engine has no member ``count``.
    """
    return "count" not in orjson.loads(answer)


def templated(answer: bytes, request: Members) -> dict[str, Any]:
    """Return the body for ``/tokenize`` with the prompt that ``/apply-template`` made from messages."""
    prompt = orjson.loads(answer)["prompt"]
    return tokenize({"prompt": prompt, "return_token_strs": request.get("return_token_strs", False)})


def tokens(answer: bytes, request: Members, context: int | None) -> Any:
    """Return the answer of ``/tokenize`` in the caller's form. ``context``: the context length, if known."""
    document = orjson.loads(answer)
    entries = document.get("tokens") or []
    ids = [entry["id"] if isinstance(entry, dict) else entry for entry in entries]
    strings = document.get("token_strs") or [
        piece if isinstance(piece := entry["piece"], str) else bytes(piece).decode("utf-8", "replace")
        for entry in entries
        if isinstance(entry, dict)
    ]
    if of_tgi(request):
        return _spans(ids, strings)
    shown = entries if members.flag(request, "with_pieces") else ids
    answer_ = {"count": len(ids), "max_model_len": context} | document | {"tokens": shown}
    wanted = members.flag(request, "return_token_strs")
    return answer_ | {"token_strs": strings if wanted else None}


def _spans(ids: list[int], strings: list[str]) -> list[dict[str, Any]]:
    spans, start = [], 0
    for id_, piece in zip(ids, strings, strict=True):
        spans.append({"id": id_, "text": piece, "start": start, "stop": start + len(piece)})
        start += len(piece)
    return spans


def detokenize(request: Members) -> dict[str, Any]:
    """Return the body for an engine's ``/detokenize``; raise BadRequest if ``tokens`` is invalid."""
    ids = request.get("tokens")
    if not isinstance(ids, list) or not all(isinstance(id_, int) for id_ in ids):
        raise BadRequest("'tokens' must be a list of the ids of tokens")
    return {"tokens": ids}


def text_of(answer: bytes) -> dict[str, Any]:
    """Return the answer of ``/detokenize`` with the members of vLLM and llama.cpp."""
    document = orjson.loads(answer)
    text = document.get("prompt", document.get("content", ""))
    return {"prompt": text, "content": text}


def not_there(model: str, path: str, message: str) -> NotFound:
    """Return the error for a path that an engine does not have."""
    return NotFound(
        f"the engine of {model!r} does not support {path} (its answer: {message}); vLLM supports {path} for "
        "suitable models"
    )
