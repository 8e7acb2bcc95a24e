"""The client ollama, unmodified."""

from __future__ import annotations

import json

import ollama
from report import MODEL, QUESTION, SCHEMA, URL, WEATHER, calls_so_far, main, needs_embeddings, refused

client = ollama.Client(host=URL)
FEW = {"num_predict": 6, "temperature": 0, "seed": 1, "num_ctx": 512}


def check_a_chat():
    answer = client.chat(model=MODEL, messages=QUESTION, options=FEW)
    assert (answer.model, answer.done, answer.message.role) == (MODEL, True, "assistant")
    assert answer.message.content
    assert answer.done_reason in ("stop", "length")
    assert 0 < answer.eval_count <= 6
    assert answer.prompt_eval_count > 0
    assert answer.total_duration >= answer.eval_duration > 0


def check_a_stream_with_the_tag_latest():
    *parts, last = client.chat(model=f"{MODEL}:latest", messages=QUESTION, options=FEW, stream=True)
    assert "".join(part.message.content for part in parts)
    assert not any(part.done for part in parts)
    assert last.done
    assert last.eval_count > 0


def check_generate():
    answer = client.generate(model=MODEL, prompt="Name a colour.", system="Be brief.", options=FEW)
    assert answer.response
    raw = client.generate(model=MODEL, prompt="One, two,", raw=True, options=FEW, stream=True)
    assert "".join(part.response for part in raw)


def check_a_schema():
    answer = client.chat(
        model=MODEL, messages=QUESTION, format=SCHEMA, options={"temperature": 0, "num_predict": 80}
    )
    assert set(json.loads(answer.message.content)) == {"colour", "number"}


def check_log_probabilities():
    answer = client.generate(model=MODEL, prompt="Name a colour.", logprobs=True, top_logprobs=2, options=FEW)
    assert all(entry.logprob <= 0 and len(entry.top_logprobs) == 2 for entry in answer.logprobs)


def check_tools_and_their_answers():
    """The chat so far has calls and their answers. Ollama's messages do not name the call of an answer."""
    history = calls_so_far(dict, tool_name="weather")
    options = {"temperature": 0, "num_predict": 60}
    answer = client.chat(model=MODEL, messages=history, tools=[WEATHER], options=options)
    (call,) = answer.message.tool_calls
    assert (call.function.name, list(call.function.arguments)) == ("weather", ["city"])
    streamed = list(client.chat(model=MODEL, messages=history, tools=[WEATHER], options=options, stream=True))
    assert [part.message.tool_calls[0].function.name for part in streamed if part.message.tool_calls] == [
        "weather"
    ]


def check_embeddings():
    needs_embeddings()
    answer = client.embed(model=MODEL, input=["one", "two"])
    assert len(answer.embeddings) == 2
    assert answer.prompt_eval_count > 0
    assert len(client.embeddings(model=MODEL, prompt="one").embedding) == len(answer.embeddings[0])


def check_the_models():
    assert f"{MODEL}:latest" in [model.model for model in client.list().models]
    assert f"{MODEL}:latest" in [model.model for model in client.ps().models]
    assert client.show(MODEL).capabilities == ["completion"]


def check_errors():
    unknown = refused(ollama.ResponseError, lambda: client.chat(model="nobody", messages=QUESTION))
    assert unknown.status_code == 404
    pulled = refused(ollama.ResponseError, lambda: client.pull("smol"))
    assert "tidegate deploy" in pulled.error
    image = [{"role": "user", "content": "What is it?", "images": ["iVBORw0KGgo="]}]
    blind = refused(ollama.ResponseError, lambda: client.chat(model=MODEL, messages=image))
    assert (blind.status_code, "does not accept images" in blind.error) == (400, True)


async def check_the_async_client():
    aclient = ollama.AsyncClient(host=URL)
    assert (await aclient.chat(model=MODEL, messages=QUESTION, options=FEW)).message.content
    stream = await aclient.generate(model=MODEL, prompt="Name a colour.", options=FEW, stream=True)
    assert [part async for part in stream]


if __name__ == "__main__":
    main()
