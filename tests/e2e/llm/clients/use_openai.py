"""The client openai, unmodified."""

from __future__ import annotations

import json

import openai
from pydantic import BaseModel
from report import GIVEN, MODEL, NO_KEY, OPENAI_URL, QUESTION, TOOLS, main, needs_embeddings, refused

client = openai.OpenAI(base_url=OPENAI_URL, api_key=NO_KEY, max_retries=0)
CHAT = {"model": MODEL, "messages": QUESTION, "max_tokens": 8, "temperature": 0}


def check_a_chat():
    answer = client.chat.completions.create(**CHAT)
    assert answer.object == "chat.completion"
    assert answer.model == MODEL
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert 0 < answer.usage.completion_tokens <= 8


def check_a_stream():
    chunks = list(client.chat.completions.create(**CHAT, stream=True))
    assert len(chunks) > 2
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert {chunk.model for chunk in chunks} == {MODEL}
    assert len({chunk.id for chunk in chunks}) == 1
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    assert not any(chunk.usage for chunk in chunks)


def check_usage_of_a_stream():
    options = {"include_usage": True}
    *_, last = client.chat.completions.create(**CHAT, stream=True, stream_options=options)
    assert last.choices == []
    assert 0 < last.usage.completion_tokens <= 8
    assert last.usage.prompt_tokens > 0


def check_several_choices():
    answer = client.chat.completions.create(**CHAT | {"temperature": 0.5}, n=2)
    assert sorted(choice.index for choice in answer.choices) == [0, 1]
    assert all(choice.message.content for choice in answer.choices)


def check_log_probabilities():
    answer = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=2)
    tokens = answer.choices[0].logprobs.content
    assert "".join(token.token for token in tokens).startswith(answer.choices[0].message.content)
    assert all(token.logprob <= 0 for token in tokens)
    assert all(len(token.top_logprobs) == 2 for token in tokens)


class Paint(BaseModel):
    colour: str
    number: int


def check_a_json_schema():
    answer = client.chat.completions.parse(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=80, response_format=Paint
    )
    assert isinstance(answer.choices[0].message.parsed, Paint)


def check_tools():
    answer = client.chat.completions.create(model=MODEL, **TOOLS, tool_choice="required")
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "weather"
    assert list(json.loads(call.function.arguments)) == ["city"]
    assert answer.choices[0].finish_reason == "tool_calls"


def check_a_stream_of_a_tool_call():
    deltas = [
        chunk.choices[0].delta
        for chunk in client.chat.completions.create(model=MODEL, **TOOLS, tool_choice="required", stream=True)
    ]
    parts = [part.function for delta in deltas for part in delta.tool_calls or []]
    assert parts[0].name == "weather"
    assert list(json.loads("".join(part.arguments or "" for part in parts))) == ["city"]


def check_a_completion():
    answer = client.completions.create(model=MODEL, prompt="One, two,", max_tokens=4, temperature=0)
    assert answer.choices[0].text
    streamed = client.completions.create(model=MODEL, prompt="One, two,", max_tokens=4, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed if chunk.choices)


def check_responses():
    answer = client.responses.create(model=MODEL, input="Name a colour.", max_output_tokens=16)
    assert answer.output_text
    assert answer.usage.output_tokens > 0
    events = list(
        client.responses.create(model=MODEL, input="Name a colour.", max_output_tokens=16, stream=True)
    )
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta")


def check_embeddings():
    needs_embeddings()
    answer = client.embeddings.create(model=MODEL, input=["one", "two"])
    assert [entry.index for entry in answer.data] == [0, 1]
    assert len({len(entry.embedding) for entry in answer.data}) == 1
    assert len(answer.data[0].embedding) > 100
    as_list = client.embeddings.create(model=MODEL, input="one", encoding_format="float").data[0].embedding
    assert max(abs(a - b) for a, b in zip(as_list, answer.data[0].embedding, strict=True)) < 1e-3


def check_models():
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL


def check_an_unknown_model():
    error = refused(
        openai.NotFoundError, lambda: client.chat.completions.create(model="nobody", messages=QUESTION)
    )
    assert error.code == "model_not_found"


def check_a_wrong_request():
    error = refused(
        openai.BadRequestError, lambda: client.chat.completions.create(model=MODEL, messages="no list")
    )
    assert error.type == "invalid_request_error"


def check_a_wrong_key():
    stranger = openai.OpenAI(base_url=OPENAI_URL, api_key="tg_none_x", max_retries=0)
    error = refused(openai.AuthenticationError, lambda: stranger.chat.completions.create(**CHAT))
    assert error.code == "invalid_api_key"


def check_a_rate_limit():
    limited = openai.OpenAI(base_url=OPENAI_URL, api_key=GIVEN["limited_key"], max_retries=0)

    def until_refused():
        for _ in range(10):
            limited.chat.completions.create(**CHAT)

    error = refused(openai.RateLimitError, until_refused)
    assert int(error.response.headers["retry-after"]) > 0


async def check_the_async_client():
    async with openai.AsyncOpenAI(base_url=OPENAI_URL, api_key=NO_KEY, max_retries=0) as aclient:
        answer = await aclient.chat.completions.create(**CHAT)
        assert answer.choices[0].message.content
        stream = await aclient.chat.completions.create(**CHAT, stream=True)
        assert [chunk async for chunk in stream]


async def check_a_cancelled_stream_frees_its_slot():
    """The engine has few slots, so a request after these many streams needs one of theirs."""
    async with openai.AsyncOpenAI(base_url=OPENAI_URL, api_key=NO_KEY, max_retries=0) as aclient:
        long = CHAT | {"max_tokens": 900, "extra_body": {"ignore_eos": True}}
        for _ in range(2 * int(GIVEN["slots"])):
            stream = await aclient.chat.completions.create(**long, stream=True)
            async for chunk in stream:
                if chunk.choices[0].delta.content:
                    break
            await stream.close()
        assert (await aclient.chat.completions.create(**CHAT)).choices[0].message.content


if __name__ == "__main__":
    main()
