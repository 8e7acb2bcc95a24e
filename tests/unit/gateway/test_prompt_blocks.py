"""The blocks of prompts: a common beginning has common hashes, for one caller."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.domain.prompt_blocks import BLOCK, MAX_BLOCKS, prompt_blocks

pytestmark = [pytest.mark.unit]

CHAT = "/v1/chat/completions"


def chat(*texts: str) -> dict:
    return {"messages": [{"role": "user", "content": text} for text in texts]}


def common(one: list[bytes], other: list[bytes]) -> int:
    return sum(a == b for a, b in zip(one, other, strict=False))


def test_a_common_beginning_has_common_blocks():
    system = "You are the assistant of a library. " * 20
    one, other = (prompt_blocks(CHAT, chat(system, question), b"") for question in ("When?", "Where is it?"))
    assert common(one, other) == len(system) // BLOCK
    assert common(one, prompt_blocks(CHAT, chat("x" + system), b"")) == 0


def test_a_longer_conversation_continues_the_chain():
    first = prompt_blocks(CHAT, chat("a" * 1000), b"")
    assert prompt_blocks(CHAT, chat("a" * 1000, "b" * 1000), b"")[: len(first)] == first


def test_callers_have_different_hashes():
    body = chat("a" * 1000)
    assert not set(prompt_blocks(CHAT, body, b"one")) & set(prompt_blocks(CHAT, body, b"other"))


def test_tools_come_before_the_messages():
    body = chat("a" * 1000)
    assert (
        common(
            prompt_blocks(CHAT, body | {"tools": [{"name": "x" * 200}]}, b""), prompt_blocks(CHAT, body, b"")
        )
        == 0
    )


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a" * 1000}),
        ("/v1/completions", {"prompt": ["a" * 1000]}),
        ("/v1/completions", {"prompt": list(range(500))}),
        ("/v1/responses", {"input": "a" * 1000}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a" * 1000}]}]}),
        (
            CHAT,
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a" * 999}}]}
                ]
            },
        ),
    ],
)
def test_every_form_of_a_prompt_has_blocks(path, body):
    assert len(prompt_blocks(path, body, b"")) >= 7


@pytest.mark.parametrize("body", [{}, {"messages": None}, {"messages": "a"}, {"messages": [1, None, {}]}])
def test_a_prompt_that_the_engine_will_refuse(body):
    assert prompt_blocks(CHAT, body, b"") == []


def test_embeddings_have_none():
    assert prompt_blocks("/v1/embeddings", {"input": "a" * 1000}, b"") == []


def test_the_work_is_limited():
    assert len(prompt_blocks(CHAT, chat("a" * 10**6), b"")) == MAX_BLOCKS


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@pytest.mark.fuzz
@given(
    body=st.dictionaries(
        st.sampled_from(["messages", "prompt", "input", "tools", "instructions"]), json_values, max_size=5
    )
)
def test_any_body_has_blocks(body):
    for path in (CHAT, "/v1/completions", "/v1/responses"):
        assert all(len(block) == 8 for block in prompt_blocks(path, body, b"salt"))
