"""Translate a request of TGI (Text Generation Inference) into a request of OpenAI's API."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from services.gateway.domain.llm import members
from services.gateway.domain.llm.members import Members
from tidegate.kernel.errors import BadRequest

PATH = "/v1/completions"
# TGI's default of max_new_tokens.
MAX_NEW_TOKENS = 100


@dataclass(frozen=True, slots=True)
class Generation:
    """A translated request of TGI. ``body``: the JSON body of the request to :data:`PATH`."""

    body: dict[str, Any]
    prompt: str
    max_new_tokens: int
    details: bool = False
    full_text: bool = False
    top_tokens: int = 0
    seed: int | None = None
    adapter: str = ""


def decode(request: Members, *, stream: bool) -> Generation:
    """Translate a request. Raise BadRequest if it is malformed, or if no engine supports it."""
    prompt = members.text(request, "inputs")
    if not prompt:
        raise BadRequest("'inputs' must not be empty")
    parameters = members.group(request, "parameters")
    _check_supported(parameters)
    most = members.whole(parameters, "max_new_tokens", 1) or MAX_NEW_TOKENS
    details = members.flag(parameters, "details")
    top_tokens = members.whole(parameters, "top_n_tokens", 0) or 0
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": most, "stream": True}
    body |= _sampling(parameters) | _grammar(members.group(parameters, "grammar"))
    if stream or details:
        body["logprobs"] = max(top_tokens, 1)
    return Generation(
        body,
        prompt,
        most,
        details,
        members.flag(parameters, "return_full_text"),
        top_tokens,
        members.whole(parameters, "seed", 0),
        members.text(parameters, "adapter_id", ""),
    )


def _check_supported(parameters: Members) -> None:
    if (members.whole(parameters, "best_of", 1) or 1) > 1:
        raise BadRequest("'best_of' above 1 is not supported: send several requests and choose one answer")
    if members.flag(parameters, "decoder_input_details"):
        raise BadRequest(
            "'decoder_input_details' is not supported: engines do not report log probabilities of the prompt"
        )
    if members.flag(parameters, "watermark"):
        raise BadRequest("'watermark' is not supported by the engines: leave it out")
    if members.whole(parameters, "truncate", 1) is not None:
        raise BadRequest("'truncate' is not supported: shorten the prompt before you send it")


def _sampling(parameters: Members) -> dict[str, Any]:
    """Return the sampling parameters of a request.

    As in TGI, decoding is greedy if the request has none of them.
    """
    temperature = members.real(parameters, "temperature")
    if temperature is not None and temperature <= 0:
        raise BadRequest("'temperature' must be above 0; for a greedy answer leave it out")
    warps = {
        "top_k": members.whole(parameters, "top_k", 1),
        "top_p": members.real(parameters, "top_p"),
        "typical_p": members.real(parameters, "typical_p"),
    }
    given = {name: value for name, value in warps.items() if value is not None}
    warmed = temperature is not None and temperature != 1.0
    sampled = members.flag(parameters, "do_sample") or warmed or bool(given)
    body: dict[str, Any] = {"temperature": (temperature or 1.0) if sampled else 0.0} | given
    if (seed := members.whole(parameters, "seed", 0)) is not None:
        body["seed"] = seed
    if (penalty := members.real(parameters, "repetition_penalty")) is not None:
        # The first name is vLLM's, the second llama.cpp's. Each engine ignores the other name.
        body |= {"repetition_penalty": penalty, "repeat_penalty": penalty}
    if (frequency := members.real(parameters, "frequency_penalty")) is not None:
        body["frequency_penalty"] = frequency
    if stop := members.texts(parameters, "stop") or members.texts(parameters, "stop_sequences"):
        body["stop"] = stop
    return body


def _grammar(grammar: Members) -> dict[str, Any]:
    if not grammar:
        return {}
    kind = members.text(grammar, "type")
    if kind not in ("json", "json_schema"):
        raise BadRequest(f"a grammar of type {kind!r} is not supported; use type 'json' with a JSON schema")
    schema = members.group(grammar, "value")
    if kind == "json_schema" and "schema" in schema:
        schema = members.group(schema, "schema")
    # vLLM reads response_format. llama.cpp reads json_schema, because it has no response_format in
    # completions.
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    return {"response_format": wanted, "json_schema": schema}
