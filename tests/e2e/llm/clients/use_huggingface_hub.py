"""The client huggingface_hub, unmodified: TGI's API, and chats."""

from __future__ import annotations

import json

from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import TextGenerationError, ValidationError
from report import MODEL, QUESTION, SCHEMA, URL, main, refused

client = InferenceClient(f"{URL}/tgi/{MODEL}")
PROMPT = "One, two, three,"


def check_a_text():
    assert client.text_generation(PROMPT, max_new_tokens=4)


def check_the_only_model_needs_no_name():
    assert InferenceClient(URL).text_generation(PROMPT, max_new_tokens=2)


def check_details():
    answer = client.text_generation(PROMPT, max_new_tokens=4, details=True, return_full_text=True, seed=3)
    assert answer.generated_text.startswith(PROMPT)
    assert "".join(token.text for token in answer.details.tokens) == answer.generated_text[len(PROMPT) :]
    assert answer.details.generated_tokens == len(answer.details.tokens) == 4
    assert (answer.details.finish_reason, answer.details.seed) == ("length", 3)
    assert all(token.id >= 0 and token.logprob <= 0 for token in answer.details.tokens)


def check_a_stream():
    pieces = list(client.text_generation(PROMPT, max_new_tokens=4, stream=True))
    assert len(pieces) == 4
    assert "".join(pieces)


def check_a_stream_with_details():
    *events, last = client.text_generation(PROMPT, max_new_tokens=4, stream=True, details=True)
    assert all(event.generated_text is None for event in events)
    assert last.generated_text == "".join(event.token.text for event in [*events, last])
    assert (last.details.finish_reason, last.details.generated_tokens) == ("length", 4)


def check_a_stop_sequence():
    text = client.text_generation(PROMPT, max_new_tokens=30, stop=[","])
    assert "," not in text


def check_a_grammar():
    text = client.text_generation(PROMPT, max_new_tokens=80, grammar={"type": "json", "value": SCHEMA})
    assert set(json.loads(text)) == {"colour", "number"}


def check_a_chat():
    answer = client.chat_completion(QUESTION, max_tokens=6)
    assert answer.choices[0].message.content
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat_completion(QUESTION, max_tokens=6, stream=True)
    ]
    assert "".join(pieces)


def check_a_refused_parameter():
    error = refused(ValidationError, lambda: client.text_generation(PROMPT, best_of=2))
    assert "best_of" in str(error)


def check_an_unknown_model():
    stranger = InferenceClient(f"{URL}/tgi/nobody")
    error = refused(TextGenerationError, lambda: stranger.text_generation(PROMPT))
    assert "unknown model: 'nobody'" in str(error)


async def check_the_async_client():
    async with AsyncInferenceClient(f"{URL}/tgi/{MODEL}") as aclient:
        assert await aclient.text_generation(PROMPT, max_new_tokens=2)
        assert [piece async for piece in await aclient.text_generation(PROMPT, max_new_tokens=2, stream=True)]


if __name__ == "__main__":
    main()
