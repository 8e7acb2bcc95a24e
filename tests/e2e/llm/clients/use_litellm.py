"""The client litellm, unmodified."""

from __future__ import annotations

import json

import litellm
from report import MODEL, NO_KEY, OPENAI_URL, QUESTION, SCHEMA, TOOLS, main, needs_embeddings, refused

TO = {"model": f"openai/{MODEL}", "api_base": OPENAI_URL, "api_key": NO_KEY, "num_retries": 0}
CHAT = TO | {"messages": QUESTION, "max_tokens": 8, "temperature": 0}


def check_a_chat():
    answer = litellm.completion(**CHAT)
    assert answer.choices[0].message.content
    assert 0 < answer.usage.completion_tokens <= 8


def check_a_stream():
    chunks = list(litellm.completion(**CHAT, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert chunks[-1].usage.completion_tokens > 0
    whole = litellm.stream_chunk_builder(chunks, messages=QUESTION)
    assert whole.choices[0].message.content


def check_a_json_schema():
    wanted = {"type": "json_schema", "json_schema": {"name": "paint", "schema": SCHEMA}}
    answer = litellm.completion(**CHAT | {"max_tokens": 80}, response_format=wanted)
    assert set(json.loads(answer.choices[0].message.content)) == {"colour", "number"}


def check_tools():
    answer = litellm.completion(**TO, **TOOLS, tool_choice="required")
    assert answer.choices[0].message.tool_calls[0].function.name == "weather"


def check_a_completion():
    answer = litellm.text_completion(
        **TO | {"model": f"text-completion-openai/{MODEL}"}, prompt="One,", max_tokens=4
    )
    assert answer.choices[0].text


def check_embeddings():
    needs_embeddings()
    answer = litellm.embedding(**TO, input=["one", "two"])
    assert len(answer.data) == 2


def check_an_unknown_model():
    refused(litellm.NotFoundError, lambda: litellm.completion(**CHAT | {"model": "openai/nobody"}))


def check_a_wrong_key():
    refused(litellm.AuthenticationError, lambda: litellm.completion(**CHAT | {"api_key": "tg_none_x"}))


def check_tgis_api():
    answer = litellm.completion(
        model="huggingface/tgi", api_base=OPENAI_URL.replace("/v1", f"/tgi/{MODEL}"), api_key=NO_KEY,
        messages=QUESTION, max_tokens=4,
    )  # fmt: skip
    assert answer.choices[0].message.content


def check_ollamas_api():
    answer = litellm.completion(
        model=f"ollama_chat/{MODEL}", api_base=OPENAI_URL.removesuffix("/v1"), messages=QUESTION, max_tokens=4
    )
    assert answer.choices[0].message.content


async def check_the_async_calls():
    answer = await litellm.acompletion(**CHAT)
    assert answer.choices[0].message.content
    assert [chunk async for chunk in await litellm.acompletion(**CHAT, stream=True)]


if __name__ == "__main__":
    main()
